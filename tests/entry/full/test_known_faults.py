"""Faults of the predecessor in training whole models, beside those that other tests of this folder are about."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.fixtures.runs import logged, write_dataset
from tests.fixtures.whole import Whole


def test_the_data_set_is_shown(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """--debug_dataset failed in most scripts."""
    fine_tune.train(dataset, tmp_path, debug_dataset=True)
    assert not list(tmp_path.glob("*.safetensors"))


def test_images_that_are_held_out_are_validated_on(tmp_path: Path, fine_tune: Whole, images: Path) -> None:
    """validation_split only removed images."""
    data = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2\nvalidation_split = 0.4")
    fine_tune.train(data, tmp_path, validate_every_n_steps=1)
    assert logged(tmp_path, "loss/validation/step_average")


def test_counters_of_pickles_count_from_one(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """The epoch was counted from 0 in saves by steps and at the end."""
    fine_tune.train(dataset, tmp_path, save_model_as="ckpt", save_every_n_steps=1, max_train_steps=2)
    for name, steps in (("tiny-step00000001", 1), ("tiny", 2)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert (saved["epoch"], saved["global_step"]) == (1, steps)


def test_folders_have_the_precision_that_was_asked_for(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """--save_precision was ignored for folders."""
    options = {"save_model_as": "diffusers_safetensors", "save_precision": "fp16", "max_train_steps": 1}
    fine_tune.train(dataset, tmp_path, **options)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / "tiny" / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} - {torch.int64} == {torch.float16}, part
