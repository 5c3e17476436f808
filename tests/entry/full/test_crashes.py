"""Whole models whose run is killed within a save: what stands is whole, and the run goes on to the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.files.atomic import verify_directory
from tests.fixtures.crashes import Ended, fork_run
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

    def train(self, log: str, at: int | None = None, resume: Path | None = None) -> Ended:
        options = {**SAVES, **OWN.get(self.whole.script, {}), "resume": resume}
        return fork_run(
            lambda: self.whole.train(self.dataset, self.output, **options),
            self.folder / f"{log}.log",
            watched=(self.output,),
            at=at,
        )

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Return the files under their own names, which must be whole."""
        for state in self.output.glob("*-state"):
            verify_directory(state)
        return {path.name: load_file(path) for path in self.output.glob("*.safetensors")}

    def newest_state(self) -> Path:
        return sorted(self.output.glob("tiny-step0000000[12]-state"))[-1]


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
    resumed = this.train("resumed", resume=this.newest_state())
    assert resumed.code == 0, f"{points[at]}\n{resumed.text}"
    files = this.files()
    for name, tensors in alone.files().items():
        assert name in files, f"{points[at]}: {name} is lost"
        assert all(torch.equal(tensor, files[name][key]) for key, tensor in tensors.items()), f"{points[at]}: {name}"


@pytest.mark.parametrize("name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_killed_within_a_save(tmp_path: Path, name: str, dataset: Path) -> None:
    (tmp_path / "model").mkdir()
    alone = case(tmp_path / "alone", make_whole(name, tmp_path / "model"), dataset)
    # what this process has imported, its forks need not import again
    alone.whole.train(dataset, tmp_path / "first", **SAVES)
    done = alone.train("alone")
    assert done.code == 0, done.text
    assert {"tiny.safetensors", "tiny-ema.safetensors"} <= alone.files().keys()
    for number, words in enumerate(MOMENTS.values()):
        check(tmp_path / str(number), alone, done.points, found(done.points, words))
