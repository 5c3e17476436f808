"""Whole models in two processes: one gradient of both, with and without DeepSpeed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.entry.test_resume import assert_same_weights
from tests.fixtures.families import Tiny
from tests.fixtures.runs import launch_script, lora_arguments, make_images, train_here, write_dataset

#: what a step changes is the gradient, and a little of the ones before
DESCENT = {
    "optimizer_type": "SGD",
    "optimizer_args": ["momentum=0.9"],
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "max_train_steps": 4,
    "ema_decay": 0.9,
    "cache_latents": True,
    "network_module": None,
    "network_dim": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, 1, 2])
def test_two_at_batch_1_are_one_at_batch_2(tmp_path: Path, sd: Tiny, zero: int | None) -> None:
    """Weights, averages and states, from which the two go on exactly."""
    if zero is not None and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    images = make_images(tmp_path / "images", [(64, 64)] * 4)
    single, pairs = (
        write_dataset(tmp_path / f"{size}.toml", images, dataset=f"batch_size = {size}") for size in (1, 2)
    )
    train_here(*lora_arguments(sd.model, pairs, tmp_path / "one", **DESCENT), script="fine_tune")
    settings = {**DESCENT, "save_every_n_steps": 2, "save_state": True}
    if zero is not None:
        settings |= {"deepspeed": True, "zero_stage": zero}
    state = tmp_path / "two" / "tiny-step00000002-state"
    for output, more in (("two", {}), ("rest", {"resume": state})):
        words = lora_arguments(sd.model, single, tmp_path / output, **settings, **more)
        done = launch_script("fine_tune.py", 2, *words)
        assert [process.code for process in done] == [0, 0], done[0].text + done[1].text
    before = load_file(sd.model.path)
    for name in ("tiny.safetensors", "tiny-ema.safetensors"):
        alone, together = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        moved = 0.0
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5)
            moved = max(moved, float((tensor.float() - before[key].float()).abs().max()))
        assert moved > 1e-3
        assert_same_weights(tmp_path / "rest" / name, tmp_path / "two" / name)
