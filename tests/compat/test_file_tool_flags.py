"""The command lines of the tools for adapter and model files equal the published ones."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.fixtures.file_tools import ROOT, TOOLS

MODULES = {tool: importlib.import_module(tool.removesuffix(".py").replace("/", ".")) for tool in TOOLS}
OURS = {"networks/convert_lora.py", "tools/lora.py"}
#: options that the published command line does not have: (tool, dest)
MORE = {("networks/lora_interrogator.py", "tokenizer_cache_dir")}


@pytest.mark.parametrize("tool", sorted(MODULES.keys() - OURS))
def test_flags(tool: str) -> None:
    file = f"{tool.removesuffix('.py').replace('/', '__')}.json"
    published = json.loads((Path(__file__).parent / "data" / "cli" / file).read_text())["options"]
    actions = {action.dest: action for action in MODULES[tool].setup_parser()._actions if action.dest != "help"}
    assert actions.keys() - {dest for tool_name, dest in MORE if tool_name == tool} == {o["dest"] for o in published}
    for option in published:
        action = actions[option["dest"]]
        assert action.option_strings == option["flags"]
        assert (action.default, action.required) == (option["default"], option["required"]), option["dest"]
        assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"]), option["dest"]
        assert (list(action.choices) if action.choices else None) == option["choices"], option["dest"]
        converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        assert converter == option["type"], option["dest"]
        assert action.help


def test_the_documented_commands_are_taken() -> None:
    seen = set()
    for page in ("flux_tools", "adapters", "adapter_tools", "sd3"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"^python ((?:networks|tools)/.*)$", text, re.MULTILINE):
            script, *words = shlex.split(command)
            MODULES[script].setup_parser().parse_args(words)
            seen.add(script)
    assert seen == MODULES.keys()
