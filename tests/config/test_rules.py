"""Every rule between options, and every refused option."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from library.architectures.sd import SD
from library.config.arguments import TrainNetworkOptions, flat, without_secrets
from library.config.availability import REFUSED
from library.config.rules import check
from library.errors import UserError

GOOD = {
    "pretrained_model_name_or_path": "model.safetensors",
    "dataset_config": Path("data.toml"),
    "output_dir": "output",
    "network_module": "networks.lora",
}


def options(**given: object) -> TrainNetworkOptions:
    return TrainNetworkOptions.from_args(argparse.Namespace(**{**GOOD, **given}))


def test_a_good_set_has_no_findings() -> None:
    assert check(options(), SD) == []


ERRORS = [
    ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path"),
    ({"network_module": None}, "--network_module"),
    ({"output_dir": None}, "--output_dir"),
    ({"output_name": "a/b"}, "--output_name a/b"),
    ({"dataset_config": None}, "no data"),
    ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "exclude each other"),
    ({"dim_from_weights": True}, "--network_weights"),
    ({"base_weights": ["a"], "base_weights_multiplier": [1.0, 2.0]}, "--base_weights_multiplier"),
    ({"sdpa": True, "xformers": True}, "exclude each other"),
    ({"cache_latents": True, "random_crop": True}, "--random_crop"),
    ({"max_train_steps": 0}, "--max_train_steps 0: must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
    ({"network_dim": 0}, "--network_dim"),
    ({"clip_skip": 0}, "--clip_skip"),
    ({"learning_rate": -1.0}, "--learning_rate"),
    ({"network_dropout": 1.5}, "--network_dropout"),
    ({"caption_dropout_rate": -0.1}, "--caption_dropout_rate"),
    ({"min_timestep": 500, "max_timestep": 400}, "--min_timestep 500"),
    ({"max_timestep": 1001}, "--max_timestep 1001"),
    ({"scale_v_pred_loss_like_noise_pred": True}, "--v_parameterization"),
    ({"v_pred_like_loss": 0.5, "v_parameterization": True}, "--v_pred_like_loss"),
    ({"adaptive_noise_scale": 0.1}, "--noise_offset"),
    ({"huber_c": 0.0}, "--huber_c"),
    ({"sample_every_n_steps": 10}, "--sample_prompts"),
]


@pytest.mark.parametrize(("given", "words"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as found:
        check(options(**given), SD)
    assert words in str(found.value)
    assert len(str(found.value).splitlines()) == 1


WARNINGS = [
    ({"train_data_dir": "x"}, "--train_data_dir"),
    ({"network_train_unet_only": True, "text_encoder_lr": [1e-5]}, "--text_encoder_lr"),
    ({"network_train_text_encoder_only": True, "unet_lr": 1e-5}, "--unet_lr"),
    ({"skip_cache_check": True}, "--skip_cache_check"),
    ({"zero_terminal_snr": True}, "--zero_terminal_snr"),
    ({"noise_offset_random_strength": True}, "--noise_offset"),
    ({"ip_noise_gamma_random_strength": True}, "--ip_noise_gamma"),
    ({"sample_prompts": "p.txt"}, "--sample_prompts"),
    ({"save_last_n_epochs": 2}, "--save_last_n_epochs"),
    ({"save_last_n_steps": 2}, "--save_last_n_steps"),
    ({"v2": True, "clip_skip": 2}, "--clip_skip"),
]


@pytest.mark.parametrize(("given", "words"), WARNINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_warnings(given: dict[str, object], words: str) -> None:
    found = check(options(**given), SD)
    assert len(found) == 1 and words in found[0]


def test_all_errors_at_once() -> None:
    with pytest.raises(UserError) as found:
        check(options(network_dim=0, learning_rate=-1.0, network_module=None), SD)
    assert len(str(found.value).splitlines()) == 3


def _other_value(default: object, kind: object) -> object:
    if default is False:
        return True
    return {int: 7, float: 0.5}.get(kind, "other")  # type: ignore[call-overload]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_option_is_refused_with_its_reason(name: str) -> None:
    field = next(field for field, _ in flat(options()) if field.name == name)
    with pytest.raises(UserError) as found:
        check(options(**{name: _other_value(field.default, field.metadata["type"])}), SD)
    assert f"--{name}: {REFUSED[name]}" in str(found.value)


def test_secrets_stay_out() -> None:
    shown = without_secrets(options(wandb_api_key="k", huggingface_token="t"))
    assert "wandb_api_key" not in shown and "huggingface_token" not in shown
    assert shown["output_dir"] == "output"
