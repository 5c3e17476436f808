"""The traced memory of a step is what tiny models really allocate on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.memory.block_stream import BlockStream
from library.training import memory_trace
from library.training.loaded import LoadedRun
from library.training.trainer import Trainer
from tests.fixtures.families import FLUX, Tiny
from tests.fixtures.runs import make_images, write_dataset
from tests.fixtures.tiny_flux import FluxFileSizes, make_tiny_flux
from tests.fixtures.whole import Whole, make_whole


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


def allocated_by_updates(loaded: LoadedRun) -> int:
    """Return the bytes that the second step of a run allocates, its update included."""
    update = loaded.update
    batch = next(iter(loaded.run.data.dataloader(epoch=0, start_batch=0, **loaded.loading)))
    loaded.kind.begin_batch(batch, 0)

    def step() -> None:
        update.start_step()
        update.backward(loaded.losses(batch).mean())
        update.step()

    step()
    return allocated(step)


ADAFACTOR = {
    "optimizer_type": "Adafactor",
    "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
    "max_grad_norm": 0.0,
}
BLOCKWISE = {**ADAFACTOR, "blockwise_fused_optimizers": True}
#: script -> options: plain updates, and updates within the backward pass, in float32 and bfloat16
WHOLE = {
    "fine_tune": {"optimizer_type": "AdamW", "max_grad_norm": 0.0},
    "sdxl_train": {**ADAFACTOR, "fused_backward_pass": True, "full_bf16": True, "mixed_precision": "bf16"},
    "flux_train": {**BLOCKWISE, "full_bf16": True, "mixed_precision": "bf16"},
    "sd3_train": {**ADAFACTOR, "fused_backward_pass": True},
    "lumina_train": BLOCKWISE,
    "flux_train-chroma": {**BLOCKWISE, "full_bf16": True, "mixed_precision": "bf16"},
    "hunyuan_image_train": BLOCKWISE,
}


QUICK = ("fine_tune", "flux_train")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WHOLE]
)
def test_the_trace_of_a_whole_model_is_what_its_step_allocates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: Path, script: str
) -> None:
    """The update included, and the optimizer's state."""
    found: dict[str, int] = {}

    def fit(self: Trainer, loaded: LoadedRun, interrupt: object) -> int:
        run, update = loaded.run, loaded.update
        traced = memory_trace.trace(run, checkpointing=run.options.training.gradient_checkpointing)
        found["traced"], found["state"] = traced.worst.peak, traced.state or 0
        found["real"] = allocated_by_updates(loaded)
        states = [value for state in update.optimizer.state.values() for value in state.values()]
        found["real state"] = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.numel() > 1)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "fit", fit)
    model = make_whole(script, tmp_path / "model")
    with pytest.raises(SystemExit):
        model.train(dataset, tmp_path / "out", cache_latents=True, sdpa=True, **WHOLE[script])
    assert found["traced"] == pytest.approx(found["real"], rel=0.1), found
    assert found["state"] == found["real state"], found


def table_of(said: str) -> list[list[float]]:
    """Return the rows of a plan's table in bytes: weights, trained, state, step, total."""
    rows = [line.split("|")[:5] for line in said.splitlines() if "| " in line and "total" not in line]
    units = {"MB": 2**20, "GB": 2**30}
    return [[float(number) * units[unit] for number, unit in (cell.split()[-2:] for cell in row)] for row in rows]


@pytest.mark.slow
def test_the_plan_swaps_trained_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a whole model whose updates are within the backward pass; what is planned is what the run takes."""
    found: dict[str, int] = {}

    def fit(self: Trainer, loaded: LoadedRun, interrupt: object) -> int:
        stream = getattr(loaded.update.settle, "__self__", None)
        if isinstance(stream, BlockStream):
            found["saved"] = stream.host_bytes - stream.buffer_bytes
            found["step"] = allocated_by_updates(loaded)
        raise SystemExit(0)

    monkeypatch.setattr(Trainer, "fit", fit)
    made = make_tiny_flux(tmp_path / "model", sizes=FluxFileSizes(double_blocks=4, single_blocks=6, hidden=128))
    deep = Whole("flux_train", FLUX, made)
    options = {**BLOCKWISE, "cache_latents": True, "sdpa": True, "gradient_checkpointing": True}

    def said(budget: str, options: dict[str, object]) -> str:
        with pytest.raises(SystemExit):
            deep.train(dataset, tmp_path / "out", **options, memory_plan=budget)
        return "".join(capsys.readouterr())

    whole, least = table_of(said("1000", options))
    budget = f"{(least[-1] + 0.06 * 2**20) / 2**30:.6f}"  # the table has tenths of MB
    words = said(budget, options)
    assert "chosen: --gradient_checkpointing --blocks_to_swap 4" in words
    _, chosen = table_of(words)[:2]
    assert whole[1] - chosen[1] == pytest.approx(found["saved"], rel=0.1)
    assert chosen[3] == pytest.approx(found["step"], rel=0.1)
    refused = said(budget, {**options, "blockwise_fused_optimizers": False})
    assert "a step of this run takes at least" in refused and "--blocks_to_swap" not in refused


def test_the_plan_chooses_what_fits(
    tmp_path: Path, sd: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheapest choice that fits is taken, from much memory to too little, through the command line."""
    said = {}
    for budget in ("1000", "auto"):
        sd.train(dataset, tmp_path, memory_plan=budget, dry_run=True, cache_latents=True)
        said[budget] = "".join(capsys.readouterr())
        assert "chosen: nothing more, about" in said[budget]
    totals = [row[-1] / 2**30 for row in table_of(said["1000"])]
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


def test_a_plan_without_the_update_says_so(
    tmp_path: Path, sd: Tiny, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prodigy reads its numbers, which a traced step does not have."""
    options = {"optimizer_type": "Prodigy", "learning_rate": 1.0, "gradient_checkpointing": True}
    sd.train(dataset, tmp_path, **options, memory_plan="1000", dry_run=True, cache_latents=True)
    said = "".join(capsys.readouterr())
    assert "memory plan: Prodigy cannot be traced" in said and "chosen: --gradient_checkpointing, about" in said
    assert table_of(said)[0][2] > 0


def test_a_run_trains_with_its_plan(tmp_path: Path, sd: Tiny, dataset: Path) -> None:
    sd.train(dataset, tmp_path, memory_plan="1000", cache_latents=True, max_train_steps=1)
    assert (tmp_path / "tiny.safetensors").is_file()
