"""Grids: which images, in which order, and what the sheet looks like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.grid import combinations, draw_sheet, read_axes
from library.inference.plan import PlannedImage

IMAGE = PlannedImage(ImageSettings("cat", "", 64, 64, 2, 5.0, "ddim", 7))
FILES = [Path("a-000001.safetensors"), Path("a-000002.safetensors")]


def test_rows_and_columns() -> None:
    axes = read_axes(["scale=3, 5", "seed=1,2,3"], [], started=False)
    found = [(p.settings.scale, p.settings.seed) for p in combinations(IMAGE, axes, [])]
    assert found == [(3, 1), (5, 1), (3, 2), (5, 2), (3, 3), (5, 3)]
    assert axes[0].labels == ("scale 3", "scale 5")


def test_files_and_strengths() -> None:
    """One of several files is on at a time, with its own strength or that of the axis."""
    axes = read_axes(["file"], FILES, started=False)
    assert axes[0].labels == ("a-000001", "a-000002")
    assert [p.multipliers for p in combinations(IMAGE, axes, [0.8, 0.5])] == [(0.8, 0.0), (0.0, 0.5)]
    both = read_axes(["file", "multiplier=0,1"], FILES, started=False)
    assert [p.multipliers for p in combinations(IMAGE, both, [0.8, 0.5])] == [(0, 0), (0, 0), (1, 0), (0, 1)]
    assert [
        p.multipliers for p in combinations(IMAGE, read_axes(["multiplier=0.5"], FILES, started=False), [1, 1])
    ] == [(0.5, 0.5)]


@pytest.mark.parametrize(
    ("axes", "files", "message"),
    [
        (["scael=3"], [], 'no axis "scael" \\(did you mean "scale"'),
        (["scale=a"], [], '--grid scale=a: "a" is not a number'),
        (["seed=1.5"], [], '"1.5" is not a whole number'),
        (["scale=nan"], [], '"nan" is not a number'),
        (["strength=0.5"], [], "there is no image to start from; give --image_path"),
        (["sampler=eulr"], [], "no such sampler .did you mean"),
        (["scale="], [], "give values"),
        (["file"], FILES[:1], "give several files"),
        (["multiplier=1"], [], "there is no network"),
        (["seed=1", "seed=2"], [], "seed is given twice"),
        (["seed=" + "1," * 30, "scale=" + "1," * 30], [], "900 images"),
    ],
)
def test_mistakes(axes: list[str], files: list[Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_axes(axes, files, started=False)


def test_the_sheet() -> None:
    axes = read_axes(["scale=3,5,7", "seed=1,2"], [], started=False)
    images = [Image.new("RGB", (64, 48), (n * 40, 0, 0)) for n in range(6)]
    sheet = np.asarray(draw_sheet(images, axes))
    reds = [int(red) for red in np.unique(sheet[(sheet[..., 1] == 0) & (sheet[..., 2] == 0)][:, 0])]
    assert {0, 40, 80, 120, 160, 200} <= set(reds)
    # each image stands whole, row by row
    for n in range(1, 6):
        rows, columns = np.nonzero((sheet == (n * 40, 0, 0)).all(axis=-1))
        assert rows.max() - rows.min() == 47 and columns.max() - columns.min() == 63
    centres = [np.argwhere((sheet == (n * 40, 0, 0)).all(axis=-1)).mean(axis=0) for n in range(1, 6)]
    assert centres[0][0] == centres[1][0] and centres[2][0] > centres[1][0]  # 1 and 2 in the first row, 3 below
    one = draw_sheet(images[:3], axes[:1])
    assert one.height < sheet.shape[0]
