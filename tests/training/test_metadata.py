"""The options in a saved file's metadata: each under its key, as it was given."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from library.training.kinds.adapter import Adapter
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.metadata import fixed_entries

#: option -> (its value, its key without ss_, the text)
RECORDED: dict[str, tuple[object, str, str]] = {
    "output_name": ("cat", "output_name", "cat"),
    "learning_rate": (1e-4, "learning_rate", "0.0001"),
    "unet_lr": (2e-4, "unet_lr", "0.0002"),
    "text_encoder_lr": ([3e-5], "text_encoder_lr", "3e-05"),
    "gradient_checkpointing": (True, "gradient_checkpointing", "True"),
    "gradient_accumulation_steps": (3, "gradient_accumulation_steps", "3"),
    "lr_warmup_steps": (0.1, "lr_warmup_steps", "0.1"),
    "network_module": ("networks.lora", "network_module", "networks.lora"),
    "network_dim": (8, "network_dim", "8"),
    "network_alpha": (4, "network_alpha", "4.0"),
    "network_dropout": (0.2, "network_dropout", "0.2"),
    "mixed_precision": ("bf16", "mixed_precision", "bf16"),
    "full_fp16": (True, "full_fp16", "True"),
    "clip_skip": (2, "clip_skip", "2"),
    "max_token_length": (150, "max_token_length", "150"),
    "cache_latents": (True, "cache_latents", "True"),
    "lowram": (True, "lowram", "True"),
    "noise_offset": (0.1, "noise_offset", "0.1"),
    "multires_noise_iterations": (6, "multires_noise_iterations", "6"),
    "multires_noise_discount": (0.8, "multires_noise_discount", "0.8"),
    "adaptive_noise_scale": (0.2, "adaptive_noise_scale", "0.2"),
    "zero_terminal_snr": (True, "zero_terminal_snr", "True"),
    "training_comment": ("of a cat", "training_comment", "of a cat"),
    "max_grad_norm": (0.5, "max_grad_norm", "0.5"),
    "caption_dropout_rate": (0.3, "caption_dropout_rate", "0.3"),
    "caption_dropout_every_n_epochs": (2, "caption_dropout_every_n_epochs", "2"),
    "caption_tag_dropout_rate": (0.4, "caption_tag_dropout_rate", "0.4"),
    "face_crop_aug_range": ("2.0,4", "face_crop_aug_range", "(2.0, 4.0)"),
    "prior_loss_weight": (0.5, "prior_loss_weight", "0.5"),
    "min_snr_gamma": (5.0, "min_snr_gamma", "5.0"),
    "scale_weight_norms": (1.5, "scale_weight_norms", "1.5"),
    "ip_noise_gamma": (0.1, "ip_noise_gamma", "0.1"),
    "debiased_estimation_loss": (True, "debiased_estimation", "True"),
    "noise_offset_random_strength": (True, "noise_offset_random_strength", "True"),
    "ip_noise_gamma_random_strength": (True, "ip_noise_gamma_random_strength", "True"),
    "loss_type": ("huber", "loss_type", "huber"),
    "huber_schedule": ("constant", "huber_schedule", "constant"),
    "huber_scale": (2.0, "huber_scale", "2.0"),
    "huber_c": (0.2, "huber_c", "0.2"),
    "fp8_base": (True, "fp8_base", "True"),
    "fp8_base_unet": (True, "fp8_base_unet", "True"),
    "validation_seed": (7, "validation_seed", "7"),
    "validation_split": (0.2, "validation_split", "0.2"),
    "max_validation_steps": (9, "max_validation_steps", "9"),
    "validate_every_n_epochs": (2, "validate_every_n_epochs", "2"),
    "validate_every_n_steps": (11, "validate_every_n_steps", "11"),
    "resize_interpolation": ("area", "resize_interpolation", "area"),
}


def entries(**given: object) -> dict[str, str]:
    options = TrainNetworkOptions.from_args(argparse.Namespace(**given))
    kind = SimpleNamespace(options=options, _args={})
    return fixed_entries(
        options,
        SimpleNamespace(metadata=lambda info: {}),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        session_id=1,
        started_at=2.0,
        seed=3,
        num_epochs=4,
        total_steps=5,
        optimizer_name="optimizer",
        scheduler_name="scheduler",
        kind=Adapter.metadata(kind),  # type: ignore[arg-type]
        data={},
    )


@pytest.mark.parametrize("option", RECORDED)
def test_an_option_is_recorded_under_its_key(option: str) -> None:
    value, key, text = RECORDED[option]
    before, after = entries(), entries(**{option: value})
    assert before[f"ss_{key}"] != text
    assert after == {**before, f"ss_{key}": text}


def test_what_the_run_knows() -> None:
    known = {"ss_session_id": "1", "ss_training_started_at": "2.0", "ss_seed": "3", "ss_num_epochs": "4"}
    known |= {"ss_max_train_steps": "5", "ss_optimizer": "optimizer", "ss_lr_scheduler": "scheduler"}
    found = entries()
    assert found.items() >= known.items()
    others = set(found) - set(known) - {f"ss_{key}" for _, key, _ in RECORDED.values()}
    assert others == {"ss_sd_scripts_commit_hash"}
