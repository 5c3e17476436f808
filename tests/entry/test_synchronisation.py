"""A step never waits for the device: whatever would, is counted, and may only happen where metrics are read late."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from library.training.run_hooks import RunHooks
from tests.fixtures.runs import ROOT, lora_arguments, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint

WAITING = ("item", "cpu", "tolist", "nonzero", "numpy", "__bool__", "__float__", "__int__", "__index__")
#: numbers that are drawn and kept on the host, and the metrics, which are read when they have arrived
ALLOWED = ("library/randomness.py", "library/data/", "library/diffusion/timesteps.py", "library/training/metrics.py")


class Waits:
    """Counts calls by the file of ours that made them, between the ends of two steps."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.counts = False

    def note(self, name: str) -> None:
        frame = sys._getframe(2)
        while frame is not None and self.counts:
            file = Path(frame.f_code.co_filename)
            # optimizers of torch keep their count of steps on the host, schedulers have no tensors at all
            if file.match("torch/optim/*.py"):
                return
            if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests"):
                self.found[f"{name} in {file.relative_to(ROOT).as_posix()}"] += 1
                return
            frame = frame.f_back


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    found = Waits()

    def counting(name: str):
        original = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *args: object, **kwargs: object) -> object:
            found.note(name)
            return original(self, *args, **kwargs)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    original = RunHooks.step_ended

    def step_ended(self: RunHooks, step: int, epoch: int) -> dict[str, torch.Tensor]:
        found.counts = 2 <= step < 6  # from within one step to within another
        return original(self, step, epoch)

    monkeypatch.setattr(RunHooks, "step_ended", step_ended)
    return found


@pytest.mark.parametrize("on_nan", ["stop", "skip", "rollback"])
def test_no_step_waits(tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, waits: Waits, on_nan: str) -> None:
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2", subset="num_repeats = 4")
    more = {
        "max_train_steps": 7,
        "on_nan": on_nan,
        "cache_latents": True,
        "ema_decay": 0.9,
        "scale_weight_norms": 1.0,
        "min_snr_gamma": 5.0,
        "noise_offset": 0.1,
        "multires_noise_iterations": 2,
        "ip_noise_gamma": 0.1,
        "loss_type": "huber",
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
    }
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **more))
    refuse_waits(waits)


@pytest.mark.parametrize("fused", ["fused_backward_pass", "blockwise_fused_optimizers", None])
def test_no_step_of_a_whole_model_waits(
    tmp_path: Path, tiny_sd: MadeCheckpoint, images: Path, waits: Waits, fused: str | None
) -> None:
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2", subset="num_repeats = 4")
    more = {
        "max_train_steps": 7,
        "cache_latents": True,
        "ema_decay": 0.9,
        "mixed_precision": "bf16",
        "full_bf16": True,
        "max_grad_norm": 0 if fused else 1.0,
        "cache_text_encoder_outputs": True,
        "lr_scheduler": "cosine",
        "network_module": None,
        "network_dim": None,
        **({fused: True} if fused else {}),
    }
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path / "out", **more), script="fine_tune")
    refuse_waits(waits)


def refuse_waits(waits: Waits) -> None:
    assert waits.found["tolist in library/training/metrics.py"] >= 3  # the test sees what it looks for
    # the noise's own draws come from generators on the host
    draws = "item in library/diffusion/noise.py"
    forbidden = {k: n for k, n in waits.found.items() if k.split(" in ")[1].startswith(ALLOWED) is False and k != draws}
    assert not forbidden, forbidden
