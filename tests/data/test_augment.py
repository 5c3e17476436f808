"""Crops around faces and changes of colour, on numbers worked by hand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from library.data.augment import (
    GAMMA_SHIFT,
    HUE_SHIFT,
    Face,
    around_face,
    at_random,
    change_colours,
    face_in_name,
    in_the_middle,
    vary_colours,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat_10_20_30_40.png", Face((10, 20), (30, 40))),
        ("my_cat_0001_10_20_30_40.jpg", Face((10, 20), (30, 40))),
        ("10_20_30_40.png", None),  # no name before it
        ("cat_10_20_30.png", None),
        ("cat_10_20_30_x.png", None),
        ("cat_2023_01_02_03.png", None),  # a date: far outside the image
        ("cat_10_20_0_40.png", None),
        ("cat_10_20_30_401.png", None),  # larger than the image
    ],
)
def test_faces_in_names(name: str, expected: Face | None) -> None:
    assert face_in_name(Path("folder_1_2_3_4") / name, (500, 400)) == expected


@pytest.mark.parametrize(
    ("center", "factor", "resized", "box"),
    [
        # face 50: twice that is 100 pixels, the bucket's shorter side, at scale 1
        ((500, 400), 2.0, (1000, 800), (400, 350, 600, 450)),
        # four times: scale 0.5, the centre at (250, 200)
        ((500, 400), 4.0, (500, 400), (150, 150, 350, 250)),
        # near a corner: moved into the image
        ((10, 790), 4.0, (500, 400), (0, 300, 200, 400)),
        # more than the image: all of it, as with a plain crop
        ((500, 400), 100.0, (200, 160), (0, 30, 200, 130)),
        # a factor of 1 would enlarge the image twice
        ((500, 400), 1.0, (1000, 800), (400, 350, 600, 450)),
    ],
)
def test_crops_around_a_face(
    center: tuple[int, int], factor: float, resized: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    face = Face(center, (50, 40))
    found = around_face((1000, 800), (200, 100), face, (factor, factor), random.Random(0), moves=False)
    assert (found.resized, found.box) == (resized, box)


def test_a_small_image_is_enlarged_as_much_as_for_a_plain_crop() -> None:
    found = around_face((50, 40), (100, 100), Face((25, 20), (10, 10)), (2.0, 2.0), random.Random(0), moves=False)
    assert found.resized == in_the_middle((50, 40), (100, 100)).resized == (125, 100)


def test_factors_are_drawn_and_the_face_stays_inside() -> None:
    rng, face, widths, starts = random.Random(0), Face((500, 400), (50, 40)), set(), set()
    for _ in range(200):
        found = around_face((1000, 800), (128, 96), face, (2.0, 5.0), rng, moves=True)
        scale = found.resized[0] / 1000
        widths.add(found.resized[0])
        starts.add(found.box[0] - round(500 * scale))
        left, top, right, bottom = found.box
        assert (right - left, bottom - top) == (128, 96)
        assert left <= (500 - 25) * scale + 1 and right >= (500 + 25) * scale - 1
        assert top <= (400 - 20) * scale + 1 and bottom >= (400 + 20) * scale - 1
    assert len(widths) > 50 and min(widths) >= 384 and max(widths) <= 960  # 1000 * 96 / (50 * 5), and by 2
    assert len(starts) > 20


def test_random_places_lie_in_what_sticks_out() -> None:
    rng = random.Random(0)
    boxes = {at_random((200, 100), (50, 50), rng).box for _ in range(300)}
    assert {box[1] for box in boxes} == {0}
    assert {box[0] for box in boxes} == set(range(51))  # 100x50 once resized


def test_hue_and_gamma() -> None:
    pixels = np.array([[[255, 0, 0], [90, 90, 90], [0, 64, 128]]], np.uint8)
    assert change_colours(pixels, hue=120.0, gamma=1.0).tolist() == [[[0, 255, 0], [90, 90, 90], [128, 0, 64]]]
    assert change_colours(pixels, hue=-120.0, gamma=1.0).tolist() == [[[0, 0, 255], [90, 90, 90], [64, 128, 0]]]
    # 90 / 255 squared is 31.76 / 255
    assert change_colours(pixels, hue=0.0, gamma=2.0)[0, 1].tolist() == [32, 32, 32]
    assert np.array_equal(change_colours(pixels, hue=0.0, gamma=1.0), pixels)


def test_colours_vary_a_little() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    made = [vary_colours(pixels, random.Random(seed)) for seed in range(20)]
    assert np.array_equal(made[0], vary_colours(pixels, random.Random(0)))
    assert len({image.tobytes() for image in made}) == 20
    # a hue step is at most a sixth of the circle per full range of a channel
    bound = 255 * (HUE_SHIFT / 60 + GAMMA_SHIFT)
    assert all(np.abs(image.astype(int) - pixels).max() <= bound for image in made)
