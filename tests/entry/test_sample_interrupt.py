"""Ctrl-C while sample images are generated: nothing is waited for but the step of the image at hand."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.families import Tiny
from tests.fixtures.runs import PATIENCE, write_dataset


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_between_two_steps_of_an_image(tmp_path: Path, tiny: Tiny, images: Path) -> None:
    """Images that are complete stay, and of the last step of training is saved what had not been: the state."""
    dataset = write_dataset(tmp_path / "data.toml", images, dataset="batch_size = 2")
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("the cat --w 64 --h 64 --s 1 --d 1\nthe dog --w 64 --h 64 --s 1000 --d 2\n")
    process = tiny.start(
        dataset, output, sample_prompts=prompts, sample_every_n_steps=2, max_train_steps=50, save_every_n_steps=2
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "sample image:" in line:
            break
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    rest, _ = process.communicate(timeout=PATIENCE)
    text = "".join(seen) + rest
    assert process.returncode == 130 and "Traceback" not in text, text
    assert "sample images: stopped after 1 of 2" in text
    assert len(list((output / "sample").glob("*.png"))) == 1
    (state,) = output.glob("tiny-step*-state")
    assert json.loads((state / "train_state.json").read_text())["current_step"] == 2
    assert (output / "tiny-step00000002.safetensors").exists() and text.count("saved weights: ") == 1
    assert time.monotonic() - pressed < 60
