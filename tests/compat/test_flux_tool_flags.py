"""The command lines of the FLUX.1 file tools equal the published ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from networks import flux_extract_lora, flux_merge_lora
from tools import convert_diffusers_to_flux

TOOLS = {
    "networks__flux_merge_lora": flux_merge_lora,
    "networks__flux_extract_lora": flux_extract_lora,
    "tools__convert_diffusers_to_flux": convert_diffusers_to_flux,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_flags(tool: str) -> None:
    published = json.loads((Path(__file__).parent / "data" / "cli" / f"{tool}.json").read_text())["options"]
    actions = {action.dest: action for action in TOOLS[tool].setup_parser()._actions if action.dest != "help"}
    assert actions.keys() == {option["dest"] for option in published}
    for option in published:
        action = actions[option["dest"]]
        assert action.option_strings == option["flags"]
        assert (action.default, action.required) == (option["default"], option["required"]), option["dest"]
        assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"]), option["dest"]
        assert (list(action.choices) if action.choices else None) == option["choices"], option["dest"]
        converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        assert converter == option["type"], option["dest"]


def test_the_documented_commands_are_taken() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "flux_tools.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    seen = set()
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert program == "python"
        tool = script.removesuffix(".py").replace("/", "__")
        TOOLS[tool].setup_parser().parse_args(arguments)
        seen.add(tool)
    assert seen == TOOLS.keys() and len(commands) == 6
