"""The command line of ``train_network.py`` equals the published one, flag by flag."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from library.config.arguments import TrainNetworkOptions, build_parser

PUBLISHED = json.loads((Path(__file__).parent / "data" / "cli" / "train_network.json").read_text())["options"]

#: flags of this project that the published command line does not have
OURS = {
    "dry_run",
    "explain",
    "strict",
    "on_bad_image",
    "ema_decay",
    "early_stopping_patience",
    "save_best",
    # published for other scripts
    "disable_mmap_load_safetensors",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "text_encoder_batch_size",
    "text_encoder_cache_variants",
}


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    parser = build_parser(list(TrainNetworkOptions.groups().values()), description=None, epilog=None)
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def test_no_flag_is_missing_or_new(actions: dict[str, argparse.Action]) -> None:
    assert len(PUBLISHED) == 193
    published = {option["dest"] for option in PUBLISHED}
    assert not OURS & published
    assert set(actions) == published | OURS


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_own_flags_change_nothing_unless_given(name: str, actions: dict[str, argparse.Action]) -> None:
    action = actions[name]
    assert action.option_strings == [f"--{name}"]
    assert action.help
    assert not action.required


@pytest.mark.parametrize("option", PUBLISHED, ids=lambda o: o["dest"])
def test_flag(option: dict, actions: dict[str, argparse.Action]) -> None:
    action = actions[option["dest"]]
    assert set(option["flags"]) <= set(action.option_strings)
    assert action.default == option["default"]
    assert action.nargs == (0 if option["action"] == "store_true" else option["nargs"])
    assert (list(action.choices) if action.choices else None) == option["choices"]
    converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    assert converter == option["type"]
    assert action.help


def test_defaults_reach_the_dataclasses() -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace(network_dim=4, unrelated=1))
    assert options.network.network_dim == 4
    assert options.optimizer.learning_rate == 2e-06
    assert options.dataset.max_data_loader_n_workers == 8
