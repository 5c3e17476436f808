"""``train_network.py`` with masks: what is masked out is not learned, and mistakes are named before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures.runs import (
    THREE_SHAPES,
    Finished,
    logged,
    lora_arguments,
    make_images,
    run_script,
    write_dataset,
)
from tests.fixtures.tiny_sd import MadeCheckpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of this test alone: their masks and caches are its own."""
    return make_images(tmp_path / "images")


def draw_masks(folder: Path, value: int) -> Path:
    folder.mkdir()
    for index, size in enumerate(THREE_SHAPES):
        Image.new("RGB", size, (value, 255 - value, 99)).save(folder / f"{index}.png")
    return folder


def train(
    tmp_path: Path, model: MadeCheckpoint, images: Path, name: str, subset: str = "", **settings: object
) -> Finished:
    dataset = write_dataset(tmp_path / f"{name}.toml", images, dataset="batch_size = 2", subset=subset)
    # without decay only gradients move weights
    arguments = lora_arguments(model, dataset, tmp_path / name, optimizer_args=["weight_decay=0"], **settings)
    return run_script("train_network.py", *arguments)


def weights(tmp_path: Path, name: str) -> dict[str, Tensor]:
    return load_file(tmp_path / name / "tiny.safetensors")


def test_nothing_is_learned_where_the_mask_is_black(tmp_path: Path, tiny_sd: MadeCheckpoint, folder: Path) -> None:
    black = f"conditioning_data_dir = '{draw_masks(tmp_path / 'black', 0)}'\nrandom_crop = true\nflip_aug = true"
    done = train(tmp_path, tiny_sd, folder, "out", black, masked_loss=True, color_aug=True, max_train_steps=3)
    assert done.code == 0, done.text
    assert logged(tmp_path / "out", "loss/current") == [0.0, 0.0, 0.0]
    assert logged(tmp_path / "out", "norm/grad_norm") == [0.0, 0.0, 0.0]
    ups = [tensor for name, tensor in weights(tmp_path, "out").items() if "lora_up" in name]
    assert ups and all(not tensor.any() for tensor in ups)  # as they were made


@pytest.mark.slow
def test_all_is_learned_where_the_mask_is_white(tmp_path: Path, tiny_sd: MadeCheckpoint, folder: Path) -> None:
    white = f"conditioning_data_dir = '{draw_masks(tmp_path / 'masks', 255)}'\nflip_aug = true"
    for name, subset in (("plain", "flip_aug = true"), ("white", white)):
        done = train(tmp_path, tiny_sd, folder, name, subset, masked_loss=name == "white", cache_latents=True)
        assert done.code == 0, done.text
    plain, white_weights = weights(tmp_path, "plain"), weights(tmp_path, "white")
    assert plain.keys() == white_weights.keys()
    assert all(torch.equal(plain[name], white_weights[name]) for name in plain)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_up" in name)


def test_nothing_is_learned_where_images_are_transparent(tmp_path: Path, tiny_sd: MadeCheckpoint, folder: Path) -> None:
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray(np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])).save(path)
    for name, encoded in (("made", 7), ("read", 0)):
        done = train(tmp_path, tiny_sd, folder, name, alpha_mask=True, cache_latents_to_disk=True)
        assert done.code == 0, done.text
        assert f"latents: {encoded} encoded" in done.text
        assert logged(tmp_path / name, "loss/current") == [0.0, 0.0]
    with np.load(folder / "2_0096x0040_sd.npz") as file:
        assert file["alpha_mask"].shape == (file["latents"].shape[1] * 8, file["latents"].shape[2] * 8)


@pytest.mark.parametrize(
    ("subset", "settings", "words"),
    [
        ("", {"masked_loss": True}, ["--masked_loss", "names no masks", "conditioning_data_dir", "alpha_mask"]),
        ("conditioning_data_dir = 'MASKS'", {"masked_loss": True}, ["conditioning_data_dir", "for 3.png"]),
        ("face_crop_aug_range = [2, 4]", {}, ["face_crop_aug_range", "face"]),
    ],
    ids=["no masks", "missing", "faces"],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    tiny_sd: MadeCheckpoint,
    folder: Path,
    subset: str,
    settings: dict[str, object],
    words: list[str],
) -> None:
    masks = draw_masks(tmp_path / "masks", 255)
    (masks / "3.png").unlink()
    done = train(tmp_path, tiny_sd, folder, "out", subset.replace("MASKS", str(masks)), **settings)
    assert done.code == 2, done.text
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in done.text
