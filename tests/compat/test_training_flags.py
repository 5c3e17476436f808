"""The command lines of the training scripts equal the published ones, flag by flag."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest

from library.training.kinds.adapter_options import TrainNetworkOptions

CLI = Path(__file__).parent / "data" / "cli"
ADAPTERS = {
    "train_network": 193, "sdxl_train_network": 196, "flux_train_network": 215, "sd3_train_network": 218,
    "lumina_train_network": 213, "hunyuan_image_train_network": 214,
}  # fmt: skip
WHOLE_MODELS = {
    "fine_tune": 167, "train_db": 169, "sdxl_train": 176, "flux_train": 194, "sd3_train": 201, "lumina_train": 191,
}  # fmt: skip
EMBEDDINGS = {
    "train_textual_inversion": 169,
    "sdxl_train_textual_inversion": 170,
    "train_textual_inversion_XTI": 168,
}
CONTROLNETS = {
    "train_control_net": 153,
    "train_controlnet": 153,
    "sdxl_train_control_net": 169,
    "flux_train_control_net": 193,
    "sdxl_train_control_net_lllite": 171,
    "sdxl_train_control_net_lllite_old": 171,
}
SCRIPTS = ADAPTERS | WHOLE_MODELS | EMBEDDINGS | CONTROLNETS
PUBLISHED = {script: json.loads((CLI / f"{script}.json").read_text())["options"] for script in SCRIPTS}

#: flags of this project that the published command line of train_network.py does not have
OURS = {
    "dry_run",
    "on_nan",
    "replay",
    "explain",
    "strict",
    "on_bad_image",
    "ema_decay",
    "text_encoder_lr1",
    "text_encoder_lr2",
    "early_stopping_patience",
    "save_best",
    "train_embedding",
    "embedding_init_word",
    "embedding_vectors",
    "embedding_weights",
    "embedding_lr",
    "bundle_embedding",
    "fp8_te",
    "fp8_matmul",
    "quantize_base",
    "memory_plan",
    # published for hunyuan_image_train_network.py
    "attn_mode",
    "split_attn",
    # published for anima_train_network.py
    "compile",
    "compile_backend",
    "compile_mode",
    "compile_dynamic",
    "compile_fullgraph",
    "compile_cache_size_limit",
    "cuda_allow_tf32",
    "cuda_cudnn_benchmark",
    # published for other scripts
    "fp8_scaled",
    "disable_mmap_load_safetensors",
    "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk",
    "text_encoder_batch_size",
    "text_encoder_cache_variants",
}


@pytest.fixture(scope="module")
def actions() -> dict[str, dict[str, argparse.Action]]:
    parsers = {script: importlib.import_module(script).setup_parser() for script in SCRIPTS}
    return {
        script: {action.dest: action for action in parser._actions if action.dest != "help"}
        for script, parser in parsers.items()
    }


@pytest.mark.parametrize("script", ADAPTERS)
def test_no_flag_is_missing_or_new(script: str, actions: dict[str, dict[str, argparse.Action]]) -> None:
    assert len(PUBLISHED[script]) == SCRIPTS[script]
    published = {option["dest"] for option in PUBLISHED[script]}
    assert set(actions[script]) == published | OURS
    assert script != "train_network" or not OURS & published


@pytest.mark.parametrize("script", [*WHOLE_MODELS, *EMBEDDINGS, *CONTROLNETS])
def test_no_flag_of_other_kinds_is_missing(script: str, actions: dict[str, dict[str, argparse.Action]]) -> None:
    """Other kinds have every flag of adapter training; further flags are published for other scripts, or ours."""
    published = {option["dest"] for option in PUBLISHED[script]}
    assert len(PUBLISHED[script]) == SCRIPTS[script] and published <= set(actions[script])
    elsewhere = {option["dest"] for options in PUBLISHED.values() for option in options}
    assert set(actions[script]) - published <= elsewhere | OURS | {"controlnet_layout"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_own_flags_change_nothing_unless_given(name: str, actions: dict[str, dict[str, argparse.Action]]) -> None:
    action = actions["train_network"][name]
    assert action.option_strings == [f"--{name}"]
    assert action.help
    assert not action.required


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
    further = {"attn_mode": ["flex"]}.get(option["dest"], [])
    assert (list(action.choices) if action.choices else None) == (option["choices"] and option["choices"] + further)
    converter = "bool" if action.nargs == 0 else getattr(action.type, "__name__", "str")
    assert converter == option["type"]
    assert action.help


def test_defaults_reach_the_dataclasses() -> None:
    options = TrainNetworkOptions.from_args(argparse.Namespace(network_dim=4, unrelated=1))
    assert options.network.network_dim == 4
    assert options.optimizer.learning_rate == 2e-06
    assert options.dataset.max_data_loader_n_workers == 8
