"""The traced memory of a step is what tiny models really allocate on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.training import memory_trace
from library.training.loaded import LoadedRun
from library.training.trainer import Trainer
from tests.fixtures.families import Tiny
from tests.fixtures.runs import make_images, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    images = make_images(folder / "images", [(64, 64)] * 2)
    return write_dataset(folder / "data.toml", images, dataset="batch_size = 2")


def allocated(step) -> int:
    """Return the bytes that are allocated on the CPU at the worst moment, beyond those at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trace_is_what_a_step_allocates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Tiny, dataset: Path, checkpointing: bool
) -> None:
    found: dict[str, int] = {}

    def fit(self: Trainer, loaded: LoadedRun, interrupt: object) -> int:
        run = loaded.run
        traced = memory_trace.trace(run, checkpointing=checkpointing)
        found["traced"] = traced.worst.peak
        assert (traced.worst.bucket, traced.worst.batch_size) == ((64, 64), 2)
        batch = next(iter(run.data.dataloader(epoch=0, start_batch=0, **loaded.loading)))
        loaded.kind.begin_batch(batch, 0)

        def step() -> None:
            loaded.losses(batch).mean().backward()
            for module in loaded.kind.modules():
                module.zero_grad()

        step()  # whatever is made once
        found["real"] = allocated(step)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(SystemExit):
        tiny.train(dataset, tmp_path, cache_latents=True, gradient_checkpointing=checkpointing, sdpa=True)
    assert found["traced"] == pytest.approx(found["real"], rel=0.1), found


def test_the_plan_chooses_what_fits(
    tmp_path: Path, sd: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheapest choice that fits is taken, from much memory to too little, through the command line."""
    said = {}
    for budget in ("1000", "auto"):
        sd.train(dataset, tmp_path, memory_plan=budget, dry_run=True, cache_latents=True)
        said[budget] = "".join(capsys.readouterr())
        assert "chosen: nothing more, about" in said[budget]
    lines = [line.split("|") for line in said["1000"].splitlines() if "| " in line and "total" not in line]
    totals = [float(line[4].split()[0]) / 1024 for line in lines]  # MB -> GB
    # a dry run on a CPU plans for a GPU, which CUDA and the allocator's gaps leave less of
    below = [f"{(total - 1e-4 + 0.6) / 0.95:.6f}" for total in totals]
    assert totals[0] > totals[-1] > 0
    sd.train(dataset, tmp_path, memory_plan=below[0], dry_run=True, cache_latents=True, lowram=True)
    chosen = "".join(capsys.readouterr())
    assert "chosen: --gradient_checkpointing" in chosen
    assert chosen.count("--lowram has no effect") == 1  # though the run is set up twice
    with pytest.raises(SystemExit):
        sd.train(dataset, tmp_path, memory_plan=below[-1], dry_run=True, cache_latents=True)
    refused = "".join(capsys.readouterr())
    assert "a step of this run takes at least" in refused and "--fp8_base_unet" in refused
    assert not list(tmp_path.iterdir())


def test_a_run_trains_with_its_plan(tmp_path: Path, sd: Tiny, dataset: Path) -> None:
    sd.train(dataset, tmp_path, memory_plan="1000", cache_latents=True, max_train_steps=1)
    assert (tmp_path / "tiny.safetensors").is_file()
