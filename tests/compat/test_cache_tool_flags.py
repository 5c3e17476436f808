"""The command line of ``tools/cache_latents.py`` takes every published flag, and besides those of training only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from library.config.arguments import TrainNetworkOptions, build_parser
from tools.cache_latents import CacheLatents, setup_parser

PUBLISHED = json.loads((Path(__file__).parent / "data" / "cli" / "tools__cache_latents.json").read_text())["options"]


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    return {action.dest: action for action in setup_parser()._actions if action.dest != "help"}


def test_no_flag_is_missing_or_new(actions: dict[str, argparse.Action]) -> None:
    assert len(PUBLISHED) == 160
    training = build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)
    of_training = {action.dest for action in training._actions}
    assert set(actions) - {option["dest"] for option in PUBLISHED} <= of_training


@pytest.mark.parametrize("option", PUBLISHED, ids=lambda o: o["dest"])
def test_flag(option: dict, actions: dict[str, argparse.Action]) -> None:
    action = actions[option["dest"]]
    assert set(option["flags"]) <= set(action.option_strings)
    assert action.default == option["default"]
    assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"])
    assert (list(action.choices) if action.choices else None) == option["choices"]
    converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    assert converter == option["type"]


def test_help_shows_what_matters_only(actions: dict[str, argparse.Action]) -> None:
    shown = {dest for dest, action in actions.items() if action.help != argparse.SUPPRESS}
    assert shown == set(CacheLatents.relevant) - {"sdxl", "flux"}
    assert {"dataset_config", "vae", "vae_batch_size", "skip_cache_check", "mixed_precision"} <= shown
    text = setup_parser().format_help()
    assert "accelerate launch tools/cache_latents.py" in text
    assert "--learning_rate" not in text
