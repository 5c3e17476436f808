"""The command lines of the tools for adapter and model files equal the published ones."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from tests.fixtures.file_tools import ROOT, TOOLS, check_option, published_options

MODULES = {tool: importlib.import_module(tool.removesuffix(".py").replace("/", ".")) for tool in TOOLS}
OURS = {"networks/convert_lora.py", "tools/lora.py"}
#: options that the published command line does not have: (tool, dest)
MORE = {("networks/lora_interrogator.py", "tokenizer_cache_dir")}


@pytest.mark.parametrize("tool", sorted(MODULES.keys() - OURS))
def test_flags(tool: str) -> None:
    published = published_options(tool)
    actions = {action.dest: action for action in MODULES[tool].setup_parser()._actions if action.dest != "help"}
    assert actions.keys() - {dest for tool_name, dest in MORE if tool_name == tool} == {o["dest"] for o in published}
    for option in published:
        check_option(actions[option["dest"]], option)


def test_the_documented_commands_are_taken() -> None:
    seen = set()
    for page in ("flux_tools", "adapters", "adapter_tools", "sd3", "hunyuan_image", "tools"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"^python ((?:networks|tools)/.*)$", text, re.MULTILINE):
            script, *words = shlex.split(command)
            if script not in MODULES:
                continue  # a tool for images, which has tests of its own
            MODULES[script].setup_parser().parse_args(words)
            seen.add(script)
    assert seen == MODULES.keys()
