"""A folder under several paths: one folder, whose images have one cache file each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.data.dataset import TrainingData
from library.errors import UserError
from tests.data.samples import SD, SIZES, Encoder

Make = Callable[..., TrainingData]
MULTI = replace(SD, cache_suffix="_flux.npz", multi_resolution=True)


@pytest.fixture(params=["link", "dots", "relative"])
def other_spelling(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "link":
        (folder.parent / "elsewhere").symlink_to(folder)
        return str(folder.parent / "elsewhere")
    if request.param == "dots":
        return f"{folder}{os.sep}..{os.sep}{folder.name}"
    monkeypatch.chdir(folder.parent)
    return folder.name


def second(folder: str, resolution: int = 64) -> str:
    return f"[[datasets]]\nresolution = {resolution}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"


def encoded(data: TrainingData) -> int:
    return data.cache_latents(Encoder, batch_size=2, to_disk=True, vae_identity="vae")


def test_sizes_of_one_image_go_into_one_file(make_data: Make, folder: Path, other_spelling: str) -> None:
    data = make_data(more=second(other_spelling, 96), latent=MULTI)
    assert {record.folder for dataset in data.datasets for record in dataset.records} == {folder}
    assert encoded(data) == 2 * len(SIZES)
    with np.load(folder / "a_0064x0064_flux.npz") as file:
        assert {"latents_8x8", "latents_12x12"} <= set(file.files)
    assert encoded(make_data(more=second(other_spelling, 96), latent=MULTI)) == 0


def test_what_one_file_cannot_hold_is_refused(make_data: Make, other_spelling: str) -> None:
    with pytest.raises(UserError, match="a_0064x0064_sd.npz holds one size and one way of resizing"):
        encoded(make_data(more=second(other_spelling, 96)))


def test_it_is_encoded_once(make_data: Make, other_spelling: str) -> None:
    same = f"[[datasets.subsets]]\nimage_dir = '{other_spelling}'\n"
    assert encoded(make_data(more=same)) == len(SIZES)
