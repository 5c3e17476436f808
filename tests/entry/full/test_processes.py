"""Whole models in several processes, and in processes that are stopped: the run of one, left alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.runs import Finished, launch_script, make_images, run_script, start_script, write_dataset
from tests.fixtures.whole import Whole

pytestmark = pytest.mark.slow

#: what a step changes is the gradient
DESCENT = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_grad_norm": 0.5, "max_train_steps": 3}


def assert_well(done: list[Finished]) -> None:
    assert [process.code for process in done] == [0] * len(done), "".join(process.text for process in done)


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_two_at_batch_1_are_one_at_batch_2(tmp_path: Path, train_db: Whole, stage: int | None) -> None:
    """Denoiser and text encoder, which stops; plain data parallelism, and ZeRO, whose stages 1 and 2 exclude that."""
    options = {} if stage is None else {"deepspeed": True, "zero_stage": stage}
    by_deepspeed = stage in (1, 2)
    if by_deepspeed:
        pytest.importorskip("deepspeed")
    images = make_images(tmp_path / "images", sizes=[(64, 64)] * 4)
    both = {**DESCENT, "stop_text_encoder_training": None if by_deepspeed else 2, "ema_decay": 0.5}
    train_db.train(write_dataset(tmp_path / "1.toml", images, dataset="batch_size = 2"), tmp_path / "one", **both)
    two = write_dataset(tmp_path / "2.toml", images, dataset="batch_size = 1")
    done = launch_script("train_db.py", 2, *train_db.words(two, tmp_path / "two", **both, **options))
    assert_well(done)
    assert ("sharding: ZeRO stage 3, " in done[0].text) == (stage == 3)
    base, moved = load_file(train_db.model.path), 0.0
    for name in ("tiny", "tiny-ema"):
        together, alone = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("two", "one"))
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-5, msg=key)
            moved = max(moved, float((tensor - base[key]).abs().max()))
    assert moved > 1e-3, "gradients are far larger than the difference that is allowed"


def test_a_stopped_run_goes_on(tmp_path: Path, fine_tune: Whole, dataset: Path) -> None:
    """SIGTERM in the middle: weights and state are saved, and the resumed run ends with the bits of one left alone."""
    options = {"max_train_steps": 40, "cache_latents": True, "mixed_precision": "bf16", "gradient_checkpointing": True}
    process = start_script("fine_tune.py", *fine_tune.words(dataset, tmp_path / "out", **options))
    seen = ""
    for line in process.stdout or ():
        seen += line
        if "first step" in line:
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            break
    seen += process.stdout.read() if process.stdout else ""
    assert process.wait() == 143, seen
    (state,) = (tmp_path / "out").glob("*-state")
    for folder, more in (("out", {"resume": state}), ("alone", {})):
        assert_well([run_script("fine_tune.py", *fine_tune.words(dataset, tmp_path / folder, **options, **more))])
    alone, resumed = (load_file(tmp_path / folder / "tiny.safetensors") for folder in ("alone", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in alone.items())
