"""The time that steps wait for their data, in the trackers and at the end of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fixtures.runs import logged, lora_arguments, train_here, write_dataset
from tests.fixtures.tiny_sd import MadeCheckpoint


def test_no_step_waits_for_data(
    tmp_path: Path, images: Path, tiny_sd: MadeCheckpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """The steps of even the tiny model take far longer than to fetch latents, without any worker."""
    dataset = write_dataset(tmp_path / "data.toml", images)
    train_here(*lora_arguments(tiny_sd, dataset, tmp_path, cache_latents=True, max_train_steps=12))
    waited, took = logged(tmp_path, "time/data_wait"), logged(tmp_path, "time/step")
    assert len(waited) == len(took) == 12
    assert all(0 < w < t for w, t in zip(waited, took, strict=True))
    # the first step in which torch and the caches are warm is the second
    share = sum(waited[1:]) / sum(took[1:])
    assert share < 0.2
    found = re.search(r"waiting for data: ([\d.]+)% of the time between steps", capfd.readouterr().err)
    assert found is not None and float(found[1]) == pytest.approx(100 * share, abs=0.1)
