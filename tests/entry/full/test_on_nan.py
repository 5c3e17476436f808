"""``--on_nan skip`` and ``rollback`` where whole models are trained: without copies on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.training import kept_state
from library.training.run_hooks import RunHooks
from tests.entry.full.test_training import changed, weights
from tests.fixtures.whole import Whole

BAD = 3
OPTIONS = {"max_train_steps": 4, "save_every_n_steps": 1, "cache_latents": True, "learning_rate": 1e-3}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of step ``BAD`` is NaN, and so are its gradients."""
    loss, begun = RunHooks.loss, RunHooks.batch_started
    now = [0]

    def batch_started(self: RunHooks, batch: object, step: int) -> None:
        now[0] = step + 1
        begun(self, batch, step)

    def spoiled(self: RunHooks, batch: object) -> Tensor:
        found = loss(self, batch)
        return found * torch.nan if now[0] == BAD else found

    monkeypatch.setattr(RunHooks, "batch_started", batch_started)
    monkeypatch.setattr(RunHooks, "loss", spoiled)


def steps(folder: Path) -> list[dict[str, Tensor]]:
    return [weights(folder, f"tiny-step{step:08d}") for step in (1, 2, 3, 4)]


@pytest.mark.usefixtures("poisoned")
def test_a_bad_step_is_left_out(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """Its update is not made at all: weights keep their bits, and the run goes on."""
    fine_tune.train(dataset, tmp_path, **OPTIONS, on_nan="skip")
    first, second, third, fourth = steps(tmp_path)
    assert changed(first, second) and not changed(second, third) and changed(third, fourth)
    assert all(bool(tensor.isfinite().all()) for tensor in fourth.values())


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_a_bad_step_is_left_out_by_every_script(tmp_path: Path, whole: Whole, dataset: Path) -> None:
    whole.train(dataset, tmp_path, **OPTIONS, on_nan="skip")
    first, second, third, fourth = steps(tmp_path)
    assert changed(first, second) and not changed(second, third) and changed(third, fourth)
    assert all(bool(tensor.isfinite().all()) for tensor in fourth.values())


@pytest.mark.usefixtures("poisoned")
def test_a_bad_step_leads_back_to_the_snapshot(
    tmp_path: Path, fine_tune: Whole, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one after step 1, on the host."""
    monkeypatch.setattr(kept_state, "KEPT_EVERY", 100)
    fine_tune.train(dataset, tmp_path, **OPTIONS, on_nan="rollback", full_bf16=True, mixed_precision="bf16")
    _, second, third, fourth = steps(tmp_path)
    base = fine_tune.model.path
    from safetensors.torch import load_file

    unet = {n: t for n, t in load_file(base).items() if n.startswith("model.diffusion_model.")}
    assert changed({n: t.bfloat16() for n, t in unet.items()}, {n: second[n] for n in unet})
    assert not changed({n: t.bfloat16() for n, t in unet.items()}, {n: third[n] for n in unet})
    assert changed(third, fourth)
