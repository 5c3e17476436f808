"""Where figures of an epoch go: over epochs, but in wandb, whose steps must not go back."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.errors import UserError
from library.training.logs import Trackers, TrackerSettings


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int, **more: Any) -> None:
        self.entries.append((values, step))


class Full(Told):
    """One whose disk is full."""

    def log(self, values: dict[str, float], step: int, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_log_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    board, wandb = Full("tensorboard"), Told("wandb")
    accelerator = SimpleNamespace(trackers=[board, wandb], init_trackers=lambda *args, **more: None)
    trackers = Trackers(accelerator, TrackerSettings(Path("logs"), ("tensorboard",), "name", {}), {})
    for step in (1, 2):
        trackers.log({"loss/current": 0.5}, step)
    assert wandb.entries == [({"loss/current": 0.5}, 1), ({"loss/current": 0.5}, 2)]
    (line,) = caplog.messages
    assert line.startswith("logs: tensorboard has ended") and "No space left" in line


def test_a_log_that_cannot_begin_is_named(tmp_path: Path) -> None:
    from accelerate import Accelerator

    (tmp_path / "logs").touch()  # a file, where the folder should be
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "logs")
    settings = TrackerSettings(tmp_path / "logs", ("tensorboard",), "name", {})
    with pytest.raises(UserError, match="logs: the log cannot be written .*--logging_dir"):
        Trackers(accelerator, settings, {})


def test_figures_of_an_epoch() -> None:
    board, wandb = Told("tensorboard"), Told("wandb")
    accelerator = SimpleNamespace(trackers=[board, wandb], init_trackers=lambda *args, **more: None)
    trackers = Trackers(accelerator, TrackerSettings(Path("logs"), ("tensorboard",), "name", {}), {})
    trackers.log_by_epoch({"loss/epoch_average": 0.5}, step=40, epoch=2)
    assert board.entries == [({"loss/epoch_average": 0.5}, 2)]
    assert wandb.entries == [({"loss/epoch_average": 0.5, "global_step": 40, "epoch": 2}, 40)]
