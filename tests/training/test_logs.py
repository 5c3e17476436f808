"""Records of trackers: names and settings when they open, metrics of an epoch over epochs (but in wandb)."""

from __future__ import annotations

import argparse
import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.errors import NoEffect, UserError
from library.training.kinds.adapter_options import TrainNetworkOptions
from library.training.logs import Trackers, TrackerSettings
from library.training.settings import tracker_settings


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int, **more: Any) -> None:
        self.entries.append((values, step))


class Full(Recorder):
    """One whose disk is full."""

    def log(self, values: dict[str, float], step: int, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_log_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    board, wandb = Full("tensorboard"), Recorder("wandb")
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
    board, wandb = Recorder("tensorboard"), Recorder("wandb")
    accelerator = SimpleNamespace(trackers=[board, wandb], init_trackers=lambda *args, **more: None)
    trackers = Trackers(accelerator, TrackerSettings(Path("logs"), ("tensorboard",), "name", {}), {})
    trackers.log_by_epoch({"loss/epoch_average": 0.5}, step=40, epoch=2)
    assert board.entries == [({"loss/epoch_average": 0.5}, 2)]
    assert wandb.entries == [({"loss/epoch_average": 0.5, "global_step": 40, "epoch": 2}, 40)]


def with_config(tmp_path: Path, text: str, **given: object) -> TrackerSettings:
    file = tmp_path / "trackers.toml"
    file.write_text(text)
    return tracker_settings(
        TrainNetworkOptions.from_args(
            argparse.Namespace(output_dir="out", log_tracker_config=str(file), log_tracker_name="cats", **given)
        )
    )


def test_trackers_get_their_tables(tmp_path: Path) -> None:
    settings = with_config(tmp_path, "[tensorboard]\nflush_secs = 5\n[wandb]\nnotes = 'x'\n", wandb_run_name="first")
    assert settings.check() == [
        f"--log_tracker_config {tmp_path}/trackers.toml: [wandb] has no effect without --log_with wandb"
    ]
    assert all(isinstance(warning, NoEffect) for warning in settings.check())
    opened: list[Any] = []
    accelerator = SimpleNamespace(trackers=[], init_trackers=lambda *args, **more: opened.append((args, more)))
    Trackers(accelerator, settings, {"seed": 1, "text_encoder_lr": [1e-4]})
    tables = {"tensorboard": {"flush_secs": 5}, "wandb": {"notes": "x", "name": "first"}}
    assert opened == [(("cats",), {"config": {"seed": 1, "text_encoder_lr": "[0.0001]"}, "init_kwargs": tables})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tensorbord]\nflush_secs = 5\n", '[tensorbord]: no such tracker (did you mean "tensorboard"?)'),
        ("tensorboard = 1\n", "[tensorboard]: must be a table"),
        (
            "[tensorboard]\nflush_sec = 5\n",
            '[tensorboard] flush_sec: tensorboard has no such setting (did you mean "fl',
        ),
        ("[tensorboard]\nlog_dir = 'x'\n", "[tensorboard] log_dir: give it as --logging_dir"),
    ],
)
def test_mistakes_in_their_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        with_config(tmp_path, text).check()
    assert f"{tmp_path}/trackers.toml: {words}" in str(raised.value)


def test_runs_are_told_apart_by_their_names() -> None:
    def name(**given: object) -> str:
        return tracker_settings(
            TrainNetworkOptions.from_args(argparse.Namespace(output_dir="out", **given))
        ).directory.name

    assert re.fullmatch(r"\d{14}-my_cat", name(output_name="my_cat"))
    assert re.fullmatch(r"first_\d{14}-my_cat", name(output_name="my_cat", log_prefix="first_"))
    assert re.fullmatch(r"\d{14}", name())


def test_times_of_the_progress_bar_have_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from library.config import console

    monkeypatch.setattr(console, "stderr_console", lambda: Console(width=120))
    bar = console.make_bar("steps")
    bar.add_task("loss 0.1", total=10, completed=3)
    with bar.console.capture() as shown:
        bar.console.print(bar.get_renderable())
    assert re.search(r"elapsed \d:\d\d:\d\d remaining \S+ loss 0\.1", shown.get())
