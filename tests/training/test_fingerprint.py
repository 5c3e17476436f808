"""Every change that breaks an exact resume is named, and no other."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.sd import SD
from library.config.arguments import flat
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.optim.optimizers import resolve_optimizer
from library.training.fingerprint import fingerprint, option_values
from library.training.kinds.adapter import Adapter
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.resume import TrainState
from tests.fixtures.runs import make_images

DATA = """
[general]
caption_extension = '.txt'
shuffle_caption = true
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = '{images}'
num_repeats = 2
"""


class Setting:
    """A dataset on disk and the fingerprints of runs on it."""

    def __init__(self, folder: Path) -> None:
        self.images = make_images(folder / "images", sizes=[(64, 64)] * 3)
        self.model = folder / "model.safetensors"
        self.model.write_bytes(b"a model")
        self.config = folder / "data.toml"
        self.config.write_text(DATA.format(images=self.images))

    def fingerprint(self, *, seed: int = 1, processes: int = 1, steps: int = 10, **given: Any) -> dict[str, object]:
        options = TrainNetworkOptions.from_args(
            argparse.Namespace(
                **{"pretrained_model_name_or_path": str(self.model), "network_module": "networks.lora", **given}
            )
        )
        data = TrainingData(
            load_dataset_config(self.config, options.dataset, options.validation), seed=seed, latent=SD.latent
        )
        chosen = options.optimizer
        optimizer = resolve_optimizer(
            chosen.optimizer_type, chosen.use_8bit_adam, chosen.use_lion_optimizer, chosen.optimizer_args, 1e-3
        )
        return fingerprint(
            options,
            data,
            seed=seed,
            batches_per_epoch=data.batches_per_process(processes),
            total_steps=steps,
            processes=processes,
            device=torch.device("cpu"),
            optimizer=optimizer.metadata_name,
            kind=Adapter.fingerprint(options),
        )


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def changes(before: dict[str, object], now: dict[str, object]) -> list[str]:
    return TrainState(1, 5, 1, before).changes(now)


def test_states_of_several_processes_with_the_order_of_before_are_named(setting: Setting) -> None:
    """They batched what is left of a bucket otherwise; those of one process have the same order as now."""
    before = {**setting.fingerprint(processes=2), "order of images": "by step"}
    (line,) = changes(before, setting.fingerprint(processes=2))
    assert line == "order of images was 'by step' and is now 'by step of all processes'"
    assert TrainState(1, 5, 1, before).order == "by step"
    assert setting.fingerprint()["order of images"] == "by step"


#: options, and what the warning says
OPTIONS = [
    ({"seed": 2}, "seed was 1 and is now 2"),
    ({"processes": 2}, "processes was 1 and is now 2"),
    ({"steps": 20}, "total steps was 10 and is now 20"),
    ({"masked_loss": True}, "--masked_loss was False and is now True"),
    ({"alpha_mask": True}, "alpha_mask of dataset 1, subset 1"),
    ({"loss_type": "huber"}, "--loss_type was 'l2' and is now 'huber'"),
    ({"min_snr_gamma": 5.0}, "--min_snr_gamma"),
    ({"prior_loss_weight": 0.5}, "--prior_loss_weight"),
    ({"noise_offset": 0.1}, "--noise_offset"),
    ({"zero_terminal_snr": True}, "--zero_terminal_snr"),
    ({"max_timestep": 900}, "--max_timestep"),
    ({"network_alpha": 4.0}, "--network_alpha"),
    ({"network_args": ["rank_dropout=0.1"]}, "--network_args was None and is now ['rank_dropout=0.1']"),
    ({"network_dropout": 0.1}, "--network_dropout"),
    ({"base_weights": ["w.safetensors"]}, "--base_weights"),
    ({"unet_lr": 1e-4}, "--unet_lr"),
    ({"text_encoder_lr": [1e-5]}, "--text_encoder_lr"),
    ({"optimizer_args": ["weight_decay=0.1"]}, "--optimizer_args"),
    ({"use_lion_optimizer": True}, "optimizer was"),
    ({"max_grad_norm": 0.0}, "--max_grad_norm"),
    ({"lr_scheduler": "cosine"}, "--lr_scheduler was"),
    ({"lr_warmup_steps": 0.1}, "--lr_warmup_steps"),
    ({"lr_scheduler_args": ["T_max=3"]}, "--lr_scheduler_args"),
    ({"mixed_precision": "bf16"}, "--mixed_precision"),
    ({"sdpa": True}, "--sdpa"),
    ({"clip_skip": 2}, "--clip_skip"),
    ({"vae": "other.safetensors"}, "--vae"),
    ({"cache_latents": True}, "latents cached"),
    ({"caption_dropout_rate": 0.5}, "captions.dropout_rate of dataset 1, subset 1 was 0.0 and is now 0.5"),
    ({"keep_tokens": 1}, "captions.keep_tokens"),
    ({"enable_bucket": True, "min_bucket_reso": 64}, "buckets.enabled of dataset 1"),
    ({"flip_aug": True}, "flip_aug of dataset 1, subset 1"),
]


@pytest.mark.parametrize(("given", "words"), OPTIONS, ids=lambda value: next(iter(value), "") if value else "")
def test_options_that_break_exactness_are_named(setting: Setting, given: dict[str, Any], words: str) -> None:
    pytest.importorskip("lion_pytorch") if "use_lion_optimizer" in given else None
    found = changes(setting.fingerprint(), setting.fingerprint(**given))
    assert any(words in line for line in found), found


FILES = [
    ("batch_size = 2", "batch_size = 3", ["batch_size of dataset 1 was 2 and is now 3"]),
    ("num_repeats = 2", "num_repeats = 3", ["num_repeats of dataset 1, subset 1"]),
    ("shuffle_caption = true", "shuffle_caption = false", ["captions.shuffle of dataset 1, subset 1"]),
    ("resolution = 64", "resolution = 128", ["buckets.resolution of dataset 1"]),
]


@pytest.mark.parametrize(("old", "new", "expected"), FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_changes_of_the_dataset_file_are_named(setting: Setting, old: str, new: str, expected: list[str]) -> None:
    before = setting.fingerprint()
    setting.config.write_text(setting.config.read_text().replace(old, new))
    found = changes(before, setting.fingerprint())
    assert all(any(line.startswith(words) for line in found) for words in expected), found


def test_changed_content_is_named(setting: Setting) -> None:
    before = setting.fingerprint()
    (setting.images / "1.txt").write_text("another caption")
    assert changes(before, setting.fingerprint()) == ["captions of dataset 1 changed"]
    (setting.images / "1.png").rename(setting.images / "9.png")
    (setting.images / "1.txt").rename(setting.images / "9.txt")
    assert "images of dataset 1 changed" in changes(before, setting.fingerprint())
    setting.model.write_bytes(b"b model")
    assert "base model changed" in changes(before, setting.fingerprint())


def test_a_dataset_less_is_named(setting: Setting) -> None:
    text = setting.config.read_text()
    setting.config.write_text(text + text.partition("[[datasets]]")[2].join(("[[datasets]]", "")))
    before = setting.fingerprint()
    setting.config.write_text(text)
    assert "datasets was 2 and is now 1" in changes(before, setting.fingerprint())


def test_the_same_things_elsewhere_are_the_same(setting: Setting, tmp_path: Path) -> None:
    before = setting.fingerprint()
    (tmp_path / "moved").mkdir()
    setting.images.rename(tmp_path / "moved" / "images")
    setting.model = setting.model.rename(tmp_path / "moved" / "m.safetensors")
    setting.config.write_text(DATA.format(images=tmp_path / "moved" / "images"))
    assert changes(before, setting.fingerprint(output_dir="elsewhere", save_every_n_steps=3, num_workers=4)) == []


def test_every_option_is_looked_at() -> None:
    """A new option counts as one that matters, until it is said to be harmless."""
    options = TrainNetworkOptions.from_args(argparse.Namespace())
    named = {name.removeprefix("--") for name, _ in option_values(options)}
    known = {field.name for field, _ in flat(options)}
    harmless = {"seed", "vae", "gradient_checkpointing", "on_nan", "output_dir", "sample_prompts", "log_with", "resume"}
    assert harmless <= known and not harmless & named
    assert {"learning_rate", "network_dim", "masked_loss", "noise_offset", "lr_scheduler", "sdpa"} <= named
    secret = replace(options, output=replace(options.output, huggingface_token="t0p"))
    assert "t0p" not in str(dict(option_values(secret)))
