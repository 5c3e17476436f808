"""From options to settings: every option reaches the piece that reads it, as itself and as nothing else."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.config.arguments import LossOptions, NoiseOptions, SchedulerOptions
from library.data.run_plan import RunPlan
from library.training.kinds.adapter import Adapter
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.settings import (
    hub_target,
    loss_settings,
    noise_settings,
    save_policy,
    schedule_settings,
    tracker_settings,
)

#: option -> (its value, the setting it is, the value of that)
Table = dict[str, tuple[object, str, object]]

NOISE: Table = {
    "noise_offset": (0.1, "offset", 0.1),
    "noise_offset_random_strength": (True, "offset_random_strength", True),
    "adaptive_noise_scale": (0.2, "adaptive_scale", 0.2),
    "multires_noise_iterations": (6, "multires_iterations", 6),
    "multires_noise_discount": (0.8, "multires_discount", 0.8),
    "ip_noise_gamma": (0.3, "ip_gamma", 0.3),
    "ip_noise_gamma_random_strength": (True, "ip_gamma_random_strength", True),
    "min_timestep": (5, "min_timestep", 5),
    "max_timestep": (900, "max_timestep", 900),
}
LOSS: Table = {
    "loss_type": ("huber", "loss_type", "huber"),
    "huber_schedule": ("constant", "huber_schedule", "constant"),
    "huber_c": (0.2, "huber_c", 0.2),
    "huber_scale": (2.0, "huber_scale", 2.0),
    "min_snr_gamma": (5.0, "min_snr_gamma", 5.0),
    "scale_v_pred_loss_like_noise_pred": (True, "scale_v_pred_like_noise_pred", True),
    "v_pred_like_loss": (0.5, "v_pred_like_weight", 0.5),
    "debiased_estimation_loss": (True, "debiased", True),
}
SCHEDULE: Table = {
    "lr_scheduler": ("cosine", "name", "cosine"),
    "lr_warmup_steps": (0.1, "warmup", 0.1),
    "lr_decay_steps": (20, "decay", 20),
    "lr_scheduler_num_cycles": (3, "num_cycles", 3),
    "lr_scheduler_power": (2.0, "power", 2.0),
    "lr_scheduler_timescale": (7, "timescale", 7),
    "lr_scheduler_min_lr_ratio": (0.1, "min_lr_ratio", 0.1),
    "lr_scheduler_type": ("StepLR", "type", "StepLR"),
    "lr_scheduler_args": (["step_size=3"], "args", ["step_size=3"]),
}
#: over 8 epochs
SAVES: Table = {
    "save_every_n_epochs": (2, "every_n_epochs", 2),
    "save_n_epoch_ratio": (2, "every_n_epochs", 4),
    "save_every_n_steps": (5, "every_n_steps", 5),
    "save_last_n_epochs": (3, "last_n_epochs", 3),
    "save_last_n_steps": (4, "last_n_steps", 4),
    "save_last_n_epochs_state": (1, "last_n_epochs_state", 1),
    "save_last_n_steps_state": (6, "last_n_steps_state", 6),
    "save_state": (True, "save_state", True),
    "save_state_on_train_end": (True, "save_state_on_train_end", True),
}
HUB: Table = {
    "huggingface_repo_id": ("me/other", "repo_id", "me/other"),
    "huggingface_repo_type": ("dataset", "repo_type", "dataset"),
    "huggingface_path_in_repo": ("/a/b/", "folder", "a/b"),
    "huggingface_token": ("hf_x", "token", "hf_x"),
    "huggingface_repo_visibility": ("public", "visibility", "public"),
    "async_upload": (True, "in_background", True),
}
TRACKERS: Table = {
    "log_with": ("wandb", "backends", ("tensorboard", "wandb")),
    "log_tracker_name": ("cats", "tracker_name", "cats"),
    "wandb_run_name": ("first", "init_kwargs", {"wandb": {"name": "first"}}),
    "wandb_api_key": ("k3y", "wandb_api_key", "k3y"),
}

MAKERS: dict[str, tuple[Callable[[TrainNetworkOptions], Any], Table]] = {
    "noise": (noise_settings, NOISE),
    "loss": (loss_settings, LOSS),
    "schedule": (schedule_settings, SCHEDULE),
    "saves": (lambda o: save_policy(o, RunPlan(4, 1, 32)), SAVES),
    "hub": (hub_target, HUB),
    "trackers": (tracker_settings, TRACKERS),
}


def options(**given: object) -> TrainNetworkOptions:
    return TrainNetworkOptions.from_args(
        argparse.Namespace(**{"output_dir": "out", "huggingface_repo_id": "me/lora", **given})
    )


@pytest.mark.parametrize(("piece", "option"), [(piece, name) for piece, (_, table) in MAKERS.items() for name in table])
def test_an_option_is_its_setting(piece: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "now")  # stands in the name of the trackers' folder
    make, table = MAKERS[piece]
    value, setting, expected = table[option]
    before, after = vars(make(options())), vars(make(options(**{option: value})))
    assert before[setting] != expected
    assert after == {**before, setting: expected}


@pytest.mark.parametrize(
    ("group", "tables", "elsewhere"),
    [
        (NoiseOptions, [NOISE], {"zero_terminal_snr"}),
        (LossOptions, [LOSS], {"prior_loss_weight", "masked_loss"}),
        (SchedulerOptions, [SCHEDULE], set()),
    ],
)
def test_no_option_is_forgotten(group: type, tables: list[Table], elsewhere: set[str]) -> None:
    assert {field.name for field in dataclasses.fields(group)} == elsewhere.union(*tables)


def test_folders_of_the_trackers() -> None:
    assert tracker_settings(options()).directory.parent == Path("out/logs")
    assert tracker_settings(options(logging_dir="l")).directory.parent == Path("l")
    assert tracker_settings(options(log_prefix="cat_")).directory.name.startswith("cat_2")


def test_no_upload_without_a_repository() -> None:
    assert hub_target(options(huggingface_repo_id=None)) is None
    assert hub_target(options(huggingface_repo_visibility="hidden")).visibility == "private"


def test_every_option_that_gives_a_part_its_own_rate_is_named() -> None:
    def found(**given: object) -> list[str]:
        return Adapter.learning_rate_flags(TrainNetworkOptions.from_args(argparse.Namespace(**given)))

    assert found(network_args=["conv_dim=4", "dora=True"]) == []
    assert found(unet_lr=0.0, text_encoder_lr=[1e-4]) == ["--unet_lr", "--text_encoder_lr"]
    assert found(text_encoder_lr1=0.0, text_encoder_lr2=1e-4) == ["--text_encoder_lr1", "--text_encoder_lr2"]
    args = ["loraplus_lr_ratio=16", "up_lr_weight=sine", "network_reg_lrs=attn=1"]
    assert found(network_args=args) == ["loraplus_lr_ratio", "up_lr_weight", "network_reg_lrs"]
