"""Batches are saved while the next ones are generated; what goes wrong there is not lost."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.inference import finishing
from library.inference.failures import NotFinite
from library.inference.finishing import Finisher
from library.inference.models import GenerateOptions, ImageModels


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


def test_an_error_of_the_thread_is_raised(
    models: ImageModels, options: GenerateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(image: Any, path: Path, record: Mapping[str, str]) -> None:
        raise UserError(f"{path}: the disk is full")

    monkeypatch.setattr(finishing, "save_png", full)
    with pytest.raises(UserError, match=r"a\.png: the disk is full"):
        with Finisher(models, options) as finisher:
            finisher.finish(torch.zeros(1, 4, 8, 8), [tmp_path / "a.png"], [{}])
    with pytest.raises(NotFinite):
        with Finisher(models, options) as finisher:
            finisher.finish(torch.full((1, 4, 8, 8), torch.nan), [tmp_path / "b.png"], [{}])
    assert threading.active_count() < 20
