"""Whole models whose run is killed, or out of disk space: what stands is whole, and the run goes on to the same bits.

The slow tests try a quarter of the kinds of write points with each script (``share_of``), another one than with the script
before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.files.atomic import verify_directory
from tests.fixtures.crashes import Ended, fork_run, share_of
from tests.fixtures.whole import SCRIPTS, Whole, make_whole

#: weights, averages, states, and retention of all
SAVES = {
    "max_train_steps": 3,
    "save_every_n_steps": 1,
    "save_last_n_steps": 1,
    "save_state": True,
    "ema_decay": 0.9,
    "cache_latents": True,
}
#: of one script: its text encoders are files beside the model
OWN = {"sd3_train": {"train_text_encoder": True}}
#: kept in the fast suite
FAST = "fine_tune"
#: where a run is killed: the first write point that has all these words
MOMENTS = {
    "weights get their name": ("os.rename", "tiny-step00000002.safetensors"),
    "a state's optimizer is written": ("open", "tiny-step00000002-state.tmp/optimizer"),
}


@dataclass(frozen=True)
class Case:
    """The runs of a script into one folder."""

    whole: Whole
    dataset: Path
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def train(
        self, log: str, at: int | None = None, resume: Path | None = None, what: Literal["kill", "full disk"] = "kill"
    ) -> Ended:
        options = {**SAVES, **OWN.get(self.whole.script, {}), "resume": resume}
        return fork_run(
            lambda: self.whole.train(self.dataset, self.output, **options),
            self.folder / f"{log}.log",
            watched=(self.output,),
            at=at,
            what=what,
        )

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the files under their own names, which must be whole."""
        for state in self.output.glob("*-state"):
            verify_directory(state)
        return {path.name: load_file(path) for path in self.output.glob("*.safetensors")}

    def newest_state(self) -> Path | None:
        """Return the newest that there are steps to go from."""
        return max(self.output.glob("tiny-step0000000[12]-state"), default=None)


def case(folder: Path, whole: Whole, dataset: Path) -> Case:
    folder.mkdir()
    return Case(whole, dataset, folder)


def found(points: list[str], words: tuple[str, ...]) -> int:
    """The number of the first write point with these words."""
    return next(n for n, point in enumerate(points) if point.startswith(words[0]) and all(w in point for w in words))


def check(folder: Path, alone: Case, points: list[str], at: int) -> None:
    """Kill a run at a write point and resume it: all files are those of the run that was left alone."""
    this = case(folder, alone.whole, alone.dataset)
    killed = this.train("killed", at=at)
    assert killed.code == -9, f"{points[at]}\n{killed.text}"
    this.files()
    assert_goes_on(this, alone, points[: at + 1])


def check_full_disk(folder: Path, alone: Case, points: list[str], at: int) -> None:
    """Let the disk be full from a write point on: one line says so, nothing is torn, and with space the run goes on."""
    this = case(folder, alone.whole, alone.dataset)
    full = this.train("full", at=at, what="full disk")
    lines = [line for line in full.text.splitlines() if line.startswith("error:")]
    this.files()
    assert not list(this.output.rglob(".*.tmp")), points[at]
    if full.code == 0:  # what only helps is done without
        assert not lines and "tiny.safetensors" in this.files(), f"{points[at]}\n{full.text}"
        return
    assert full.code == 2 and len(lines) == 1 and "the disk is full" in lines[0], f"{points[at]}\n{full.text}"
    assert_goes_on(this, alone, points[: at + 1])


def assert_goes_on(this: Case, alone: Case, points: list[str]) -> None:
    state = this.newest_state()
    had_state = any(point.startswith("os.rename") and point.endswith("-state") for point in points[:-1])
    assert state is not None or not had_state, f"{points[-1]}: no state is left"
    resumed = this.train("resumed", resume=state)
    assert resumed.code == 0, f"{points[-1]}\n{resumed.text}"
    files = this.files()
    for name, tensors in alone.files().items():
        assert name in files, f"{points[-1]}: {name} is lost"
        assert all(torch.equal(tensor, files[name][key]) for key, tensor in tensors.items()), f"{points[-1]}: {name}"


def left_alone(folder: Path, name: str, dataset: Path) -> tuple[Case, list[str]]:
    """Return the run of a script to its end, and its write points."""
    (folder / "model").mkdir()
    alone = case(folder / "alone", make_whole(name, folder / "model"), dataset)
    # what this process has imported, its forks need not import again
    alone.whole.train(dataset, folder / "first", **SAVES)
    done = alone.train("alone")
    assert done.code == 0, done.text
    assert {"tiny.safetensors", "tiny-ema.safetensors"} <= alone.files().keys()
    return alone, done.points


@pytest.mark.parametrize("name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_killed_within_a_save(tmp_path: Path, name: str, dataset: Path) -> None:
    alone, points = left_alone(tmp_path, name, dataset)
    for number, words in enumerate(MOMENTS.values()):
        check(tmp_path / str(number), alone, points, found(points, words))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_write_points(tmp_path: Path, name: str, dataset: Path) -> None:
    alone, points = left_alone(tmp_path, name, dataset)
    for at in share_of(points, list(SCRIPTS).index(name)):
        check(tmp_path / str(at), alone, points, at)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_disk_that_is_full_from_write_points_on(tmp_path: Path, name: str, dataset: Path) -> None:
    alone, points = left_alone(tmp_path, name, dataset)
    growing = [at for at, point in enumerate(points) if point.startswith(("open", "os.mkdir"))]
    for number in share_of([points[at] for at in growing], list(SCRIPTS).index(name)):
        check_full_disk(tmp_path / str(number), alone, points, growing[number])
