"""``benchmarks/generate.py`` measures both sides, for every kind of work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.generate import SIDES, WORKS, further_images, make_files


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sd", "sdxl"])
def test_further_images(tmp_path: Path, arch: str, own_root_logger: None) -> None:
    args = argparse.Namespace(arch=arch, pixels=64, steps=3, rounds=1, dtype="fp32")
    make_files(tmp_path, arch, "tiny")
    for work in WORKS:
        found = further_images(args, tmp_path, work)
        assert tuple(found) == SIDES
        # of two rounds, the first makes ready: an image of one step and one of three; those of diffusers have fixed names
        assert len(list((tmp_path / "ours").glob("*.png"))) >= 4 * (4 if work == "batch" else 1)
        assert list((tmp_path / "diffusers").glob("*.png"))
