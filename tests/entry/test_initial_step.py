"""Runs that begin in the middle: numbers, names and data go on, with accumulation too."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from tests.entry.test_resume import assert_same_weights
from tests.fixtures.families import Tiny
from tests.fixtures.runs import make_images, metadata_of, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five batches an epoch; with two to a step, three steps, the last of one batch."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder / "data.toml", make_images(folder / "images", sizes=[(64, 64)] * 5))


def test_weights_of_the_middle_go_on_as_they_would_have(tmp_path: Path, tiny: Tiny, dataset: Path) -> None:
    """Without momentum and schedule, weights are all there is: the run ends bit-equal to one in a piece."""
    settings = {
        "optimizer_type": "SGD",
        "learning_rate": 0.1,
        "max_train_steps": None,
        "max_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "save_every_n_steps": 4,
        "save_every_n_epochs": 1,
        "cache_latents": True,
    }
    tiny.train(dataset, tmp_path / "whole", **settings)
    middle = tmp_path / "whole" / "tiny-step00000004.safetensors"
    begun = {**settings, "network_weights": middle, "initial_step": 4}
    tiny.train(dataset, tmp_path / "rest", **begun, skip_until_initial_step=True)
    assert_same_weights(tmp_path / "rest" / "tiny.safetensors", tmp_path / "whole" / "tiny.safetensors")
    assert sorted(p.name for p in (tmp_path / "rest").glob("*.safetensors")) == [
        "tiny-000002.safetensors", "tiny-step00000008.safetensors", "tiny.safetensors"
    ]  # fmt: skip
    entries = metadata_of(tmp_path / "rest" / "tiny-step00000008.safetensors")
    assert (entries["ss_steps"], entries["ss_epoch"], entries["ss_num_epochs"]) == ("8", "3", "3")

    # without skipping, the second epoch's data start anew, and so the run has 4 + 3 + 3 steps
    tiny.train(dataset, tmp_path / "anew", **begun)
    assert sorted(p.name for p in (tmp_path / "anew").glob("*.safetensors")) == [
        "tiny-000002.safetensors", "tiny-step00000008.safetensors", "tiny.safetensors"
    ]  # fmt: skip
    entries = metadata_of(tmp_path / "anew" / "tiny.safetensors")
    assert (entries["ss_steps"], entries["ss_epoch"]) == ("10", "3")
    assert metadata_of(tmp_path / "anew" / "tiny-000002.safetensors")["ss_steps"] == "7"
    one, other = load_file(tmp_path / "anew" / "tiny.safetensors"), load_file(tmp_path / "whole" / "tiny.safetensors")
    assert any(not equal(one[name], other[name]) for name in one)


def test_a_start_after_the_end(tmp_path: Path, tiny: Tiny, dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tiny.train(dataset, tmp_path, initial_epoch=2, max_train_steps=5)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and line.startswith("error: --initial_epoch 2: ") and "--max_train_steps" in line
