"""Killed, or out of disk space, at write points of a run that writes all there is to write.

The first family is tried at every write point. Each other family has a quarter of their kinds (``share_of``), another one
than the family before it, so that four families together have them all. What is written is the same for every family but
for the names of the caches.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.files.atomic import verify_directory
from tests.fixtures.crashes import SHARES, Ended, fork_run, kind_of, share_of, tried
from tests.fixtures.families import FAMILIES, Tiny
from tests.fixtures.runs import make_images, write_dataset

STEPS = 3
#: weights, averages, states, retention of both, best weights, both caches, remembered metadata, previews
EVERYTHING = {
    "max_train_steps": STEPS,
    "network_train_unet_only": True,
    "ema_decay": 0.9,
    "save_every_n_steps": 1,
    "save_last_n_steps": 1,
    "save_state": True,
    "save_best": True,
    "validation_split": 0.4,
    "validate_every_n_steps": 1,
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "sample_every_n_steps": 2,
    "sample_sampler": "euler",
}


@dataclass(frozen=True)
class Case:
    """One run's own copy of the images, and its output."""

    tiny: Tiny
    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def train(self, log: str, **more: object) -> Ended:
        hook = {name: more.pop(name) for name in ("at", "what") if name in more}
        return fork_run(
            lambda: self.train_here(**more),
            self.folder / f"{log}.log",
            watched=(self.images, self.output),
            **hook,
        )

    def train_here(self, **more: object) -> None:
        """Run in this process."""
        prompts = self.folder / "prompts.txt"
        prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
        data = write_dataset(self.folder / "data.toml", self.images, general="cache_info = true")
        self.tiny.train(data, self.output, **{**EVERYTHING, "sample_prompts": prompts, **more})

    def check_files(self) -> None:
        """Whatever stands under its own name is whole."""
        for path in self.output.glob("*.safetensors"):
            assert load_file(path), path
        for path in self.output.glob("*-state"):
            verify_directory(path)
        for path in self.output.glob("sample/*.png"):
            Image.open(path).load()
        for path in self.images.glob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))

    def newest_state(self) -> Path | None:
        """The newest that there are steps to go from."""
        found = sorted(self.output.glob(f"tiny-step*[!{STEPS}]-state"))
        return found[-1] if found else None

    def results(self) -> dict[str, dict[str, torch.Tensor]]:
        return {path.name: load_file(path) for path in self.output.glob("*.safetensors")}

    def temporary_files(self) -> list[Path]:
        return [p for folder in (self.output, self.images) for p in folder.rglob(".*.tmp")]


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run."""

    points: list[str]
    results: dict[str, dict[str, torch.Tensor]]


def start(tmp_path: Path, tiny: Tiny) -> Case:
    case = Case(tiny, tmp_path / "case")
    shutil.rmtree(case.folder, ignore_errors=True)
    make_images(case.images, [(64, 64)] * 5)
    return case


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Whole:
    # what this process has imported, its forks need not import again; runs are compared bit for bit
    torch.set_num_threads(1)
    start(tmp_path_factory.mktemp("first"), tiny).train_here()
    case = start(tmp_path_factory.mktemp("whole"), tiny)
    done = case.train("whole")
    assert done.code == 0, done.text
    assert not case.temporary_files()
    return Whole(done.points, case.results())


def state_was_there(points: list[str]) -> bool:
    """Whether a state had been put in place before the last of these points."""
    return any(p.startswith("os.rename") and p.endswith("-state") and "step" in p for p in points[:-1])


def check_kill(case: Case, whole: Whole, at: int) -> None:
    killed = case.train("killed", at=at)
    where = f"killed at {at}: {killed.points[-1]}"
    assert killed.code == -9, f"{where}\n{killed.text}"
    case.check_files()
    state = case.newest_state()
    assert state is not None or not state_was_there(killed.points), f"{where}: no state is left"
    resumed = case.train("resumed", **({} if state is None else {"resume": state}))
    assert resumed.code == 0, f"{where}\n{resumed.text}"
    case.check_files()
    results = case.results()
    for name, tensors in whole.results.items():
        assert name in results, f"{where}: {name} is lost"
        same = all(torch.equal(tensor, results[name][key]) for key, tensor in tensors.items())
        assert same, f"{where}: {name} differs"


def check_full_disk(case: Case, whole: Whole, at: int) -> None:
    full = case.train("full", at=at, what="full disk")
    assert len(full.points) > at, f"ended with {full.code} before write point {at}\n{full.text}"
    where = f"full at {at}: {full.points[at]}"
    assert "Traceback" not in full.text, f"{where}\n{full.text}"
    lines = [line for line in full.text.splitlines() if line.startswith("error:")]
    # what only helps, such as remembered hashes, is done without; but a run whose results are missing has failed
    assert full.code == 2 or (case.output / "tiny.safetensors").exists(), f"{where}\n{full.text}"
    if full.code:
        assert full.code == 2 and len(lines) == 1 and "the disk is full" in lines[0], f"{where}\n{full.text}"
    assert not case.temporary_files(), where
    case.check_files()
    state = case.newest_state()
    assert state is not None or not state_was_there(full.points[: at + 1]), f"{where}: no state is left"
    if full.code:  # with space again, the run goes on
        resumed = case.train("resumed", **({} if state is None else {"resume": state}))
        assert resumed.code == 0, f"{where}\n{resumed.text}"
        tensors, again = whole.results["tiny.safetensors"], case.results()["tiny.safetensors"]
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items()), where


def test_the_run_writes_all_there_is(tiny: Tiny, whole: Whole) -> None:
    text = "\n".join(whole.points)
    caches = (tiny.family.latent_suffix, tiny.family.text_suffix)
    for part in (
        "tiny-step00000001-state.tmp/optimizer.bin", "-state.removed.tmp", "tiny-best-ema.safetensors", *caches,
        "metadata_cache.json", ".png.", "train_state.json", "manifest.json",
    ):  # fmt: skip
        assert part in text, f"{part} is not among the write points:\n{text}"


def test_killed_at_some_write_points(tmp_path: Path, tiny: Tiny, whole: Whole) -> None:
    in_retention = next(i for i, p in enumerate(whole.points) if "-state.removed.tmp" in p) + 1
    check_kill(start(tmp_path, tiny), whole, in_retention)


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_middle_of_a_state(tmp_path: Path, tiny: Tiny, whole: Whole) -> None:
    in_state = next(i for i, p in enumerate(whole.points) if "step00000002-state.tmp/manifest" in p)
    check_full_disk(start(tmp_path, tiny), whole, in_state)


def own_share(tiny: Tiny, points: list[str]) -> list[int]:
    """All points for the first family, some for each other."""
    number = list(FAMILIES).index(tiny.family.name)
    return share_of(points, number) if number else list(range(len(tried(points))))


def test_so_many_families_together_have_every_kind_of_point() -> None:
    points = [f"open /tmp/out/.tiny-step0000000{n}.safetensors.tmp" for n in range(3)]
    points += [f"open /tmp/out/state.tmp/{name}.bin" for name in "abcdefg"] + ["end"] * 3
    chosen = [[points[at] for at in share_of(points, family)] for family in range(SHARES)]
    assert {kind_of(point) for share in chosen for point in share} == {kind_of(point) for point in points[:-3]}
    assert all(len(share) == 2 for share in chosen)


@pytest.mark.slow
def test_killed_at_write_points(tmp_path: Path, tiny: Tiny, whole: Whole) -> None:
    for at in own_share(tiny, whole.points):
        check_kill(start(tmp_path, tiny), whole, at)


@pytest.mark.slow
def test_a_disk_that_is_full_from_write_points_on(tmp_path: Path, tiny: Tiny, whole: Whole) -> None:
    growing = [at for at, point in enumerate(whole.points) if point.startswith(("open", "os.mkdir"))]
    for number in own_share(tiny, [whole.points[at] for at in growing]):
        check_full_disk(start(tmp_path, tiny), whole, growing[number])
