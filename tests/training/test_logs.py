"""Where figures of an epoch go: over epochs, but in wandb, whose steps must not go back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from library.training.logs import Trackers, TrackerSettings


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int, **more: Any) -> None:
        self.entries.append((values, step))


def test_figures_of_an_epoch() -> None:
    board, wandb = Told("tensorboard"), Told("wandb")
    accelerator = SimpleNamespace(trackers=[board, wandb], init_trackers=lambda *args, **more: None)
    trackers = Trackers(accelerator, TrackerSettings(Path("logs"), ("tensorboard",), "name", {}), {})
    trackers.log_by_epoch({"loss/epoch_average": 0.5}, step=40, epoch=2)
    assert board.entries == [({"loss/epoch_average": 0.5}, 2)]
    assert wandb.entries == [({"loss/epoch_average": 0.5, "global_step": 40, "epoch": 2}, 40)]
