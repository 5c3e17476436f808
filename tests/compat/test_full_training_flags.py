"""The command lines of the scripts that train whole models have every published flag, as published."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest

CLI = Path(__file__).parent / "data" / "cli"
SCRIPTS = {"fine_tune": 167, "train_db": 169, "sdxl_train": 176, "flux_train": 194}
PUBLISHED = {script: json.loads((CLI / f"{script}.json").read_text())["options"] for script in SCRIPTS}


@pytest.fixture(scope="module")
def actions() -> dict[str, dict[str, argparse.Action]]:
    parsers = {script: importlib.import_module(script).setup_parser() for script in SCRIPTS}
    return {
        script: {action.dest: action for action in parser._actions if action.dest != "help"}
        for script, parser in parsers.items()
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_missing(script: str, actions: dict[str, dict[str, argparse.Action]]) -> None:
    assert len(PUBLISHED[script]) == SCRIPTS[script]
    assert {option["dest"] for option in PUBLISHED[script]} <= set(actions[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_of_adapters_is_offered(script: str, actions: dict[str, dict[str, argparse.Action]]) -> None:
    assert not [name for name in actions[script] if name.startswith("network_")]


@pytest.mark.parametrize(
    ("script", "option"),
    [
        pytest.param(script, option, id=f"{script}-{option['dest']}")
        for script in SCRIPTS
        for option in PUBLISHED[script]
    ],
)
def test_flag(script: str, option: dict, actions: dict[str, dict[str, argparse.Action]]) -> None:
    action = actions[script][option["dest"]]
    assert set(option["flags"]) <= set(action.option_strings)
    assert action.default == option["default"]
    assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"])
    assert (list(action.choices) if action.choices else None) == option["choices"]
    converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    assert converter == option["type"]
    assert action.help
