"""Batches are saved while the next ones are generated; what goes wrong there is not lost."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference import finishing
from library.inference.failures import NotFinite
from library.inference.features.image_to_image import encode_sources
from library.inference.finishing import Finisher
from library.inference.generate import decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.fixtures.drawn import pixels, text_of


def test_the_next_batch_does_not_wait_for_the_file(
    models: ImageModels, options: GenerateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_save, saved = threading.Event(), []

    def slow(image: Any, path: Path, record: Mapping[str, str]) -> None:
        assert may_save.wait(30)
        saved.append((path, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(finishing, "save_png", slow)
    with Finisher(models, options) as finisher:
        finisher.finish(torch.zeros(1, 4, 8, 8), [tmp_path / "a.png"], [{}])
        assert saved == []  # and here the next batch would be generated
        may_save.set()
    assert saved == [(tmp_path / "a.png", False)]


@pytest.mark.parametrize("beside", [False, True])
def test_images_and_their_order_are_the_same_beside_the_next_batch(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, tmp_path: Path, beside: bool
) -> None:
    """While the models generate the next batch, also from an image, which the same VAE encodes."""
    batches = [[replace(settings, seed=10 * batch + place) for place in range(2)] for batch in range(4)]
    expected, threads = [], set()
    for batch in batches:
        expected += decode_images(models, generate_latents(models, batch, options), options)
    models.vae.decoder.register_forward_pre_hook(lambda *_: threads.add(threading.current_thread().name))
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    with Finisher(models, options, decodes_beside=beside) as finisher:
        for number, batch in enumerate(batches):
            latents = generate_latents(models, batch, options)
            finisher.finish(latents, paths[2 * number : 2 * number + 2], [{"seed": str(s.seed)} for s in batch])
            encode_sources(models, torch.zeros(1, 3, 64, 64), [1], options.device)
    for path, image, seed in zip(paths, expected, (s.seed for batch in batches for s in batch), strict=True):
        assert np.array_equal(pixels(path), np.asarray(image)) and text_of(path)["seed"] == str(seed)
    assert {name.startswith("finisher") for name in threads} == {beside}
    times = [path.stat().st_mtime_ns for path in paths]
    assert times == sorted(times)


@pytest.mark.gpu
def test_a_gpu_decodes_beside_the_next_batch(models: ImageModels, settings: ImageSettings, tmp_path: Path) -> None:
    options = GenerateOptions(device=torch.device("cuda"))
    models.denoiser.cuda(), models.text_encoders[0].cuda(), models.vae.cuda()
    batches = [[replace(settings, seed=seed)] for seed in range(3)]
    found: dict[bool, list[np.ndarray]] = {}
    for beside in (False, True):
        with Finisher(models, options, decodes_beside=beside) as finisher:
            for number, batch in enumerate(batches):
                latents = generate_latents(models, batch, options)
                finisher.finish(latents, [tmp_path / f"{beside}{number}.png"], [{}])
        found[beside] = [pixels(tmp_path / f"{beside}{number}.png") for number in range(3)]
    assert all(np.array_equal(*pair) for pair in zip(*found.values(), strict=True))


@pytest.mark.parametrize("beside", [False, True])
def test_an_error_of_the_thread_is_raised(
    models: ImageModels, options: GenerateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    def full(image: Any, path: Path, record: Mapping[str, str]) -> None:
        raise UserError(f"{path}: the disk is full")

    monkeypatch.setattr(finishing, "save_png", full)
    with pytest.raises(UserError, match=r"a\.png: the disk is full"):
        with Finisher(models, options, decodes_beside=beside) as finisher:
            finisher.finish(torch.zeros(1, 4, 8, 8), [tmp_path / "a.png"], [{}])
    with pytest.raises(UserError, match="the disk is full"):  # where the next batch begins, if not before
        with Finisher(models, options, decodes_beside=beside) as finisher:
            for name in ("c", "d"):
                finisher.finish(torch.zeros(1, 4, 8, 8), [tmp_path / f"{name}.png"], [{}])
    with pytest.raises(NotFinite):
        with Finisher(models, options, decodes_beside=beside) as finisher:
            finisher.finish(torch.full((1, 4, 8, 8), torch.nan), [tmp_path / "b.png"], [{}])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("finisher")]
