"""Every published script is there under its name and takes all its published flags."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHED = {file.stem.replace("__", "/"): file for file in (Path(__file__).parent / "data" / "cli").glob("*.json")}


def test_none_is_lost() -> None:
    counts = Counter(name.rpartition("/")[0] for name in PUBLISHED)
    assert counts == {"": 29, "finetune": 7, "networks": 15, "tools": 11}


@pytest.mark.parametrize("script", sorted(PUBLISHED))
def test_every_flag_is_taken(script: str) -> None:
    assert (ROOT / f"{script}.py").is_file()
    parser = importlib.import_module(script.replace("/", ".")).setup_parser()
    options = json.loads(PUBLISHED[script].read_text("utf-8"))["options"]
    assert {flag for option in options for flag in option["flags"]} <= set(parser._option_string_actions)
    places = [action.dest for action in parser._actions if not action.option_strings]
    published = [option["dest"] for option in options if not option["flags"]]
    assert places[: len(published)] == published  # in their order; further ones may follow
