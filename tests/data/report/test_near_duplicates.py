"""Fingerprints and the search among them: against brute force, and on images that were changed as people do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from library.data.records import ImageRecord
from library.data.report.looks import BITS, Look, look_at
from library.data.report.near_duplicates import (
    DISTANCE,
    Pair,
    equal_files,
    look_alikes,
    on_both_sides,
    pairs_within,
)


def scene(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """An image with large shapes, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def near(rng: random.Random, value: int, bits: int) -> int:
    for bit in rng.sample(range(BITS), bits):
        value ^= 1 << bit
    return value


@pytest.mark.parametrize("distance", [0, 1, 5, DISTANCE, 32])
def test_the_search_finds_what_comparing_all_finds(distance: int) -> None:
    rng = random.Random(distance)
    values = [rng.getrandbits(BITS) for _ in range(60)]
    values += [near(rng, values[rng.randrange(60)], rng.randint(0, distance + 2)) for _ in range(60)]
    values += [near(rng, 0, rng.randint(0, 6)) for _ in range(80)]  # a crowd, as drawings on white paper are
    expected = {
        (i, j) for i, j in combinations(range(len(values)), 2) if (values[i] ^ values[j]).bit_count() <= distance
    }
    assert pairs_within(values, distance) == expected
    assert expected


def test_ten_thousand_take_a_moment() -> None:
    rng = random.Random(1)
    values = [rng.getrandbits(BITS) for _ in range(10_000)]
    values += [near(rng, value, 3) for value in values[:20]]
    began = time.process_time()
    assert pairs_within(values, DISTANCE) == {(i, 10_000 + i) for i in range(20)}
    assert time.process_time() - began < 5


CHANGES: list[tuple[str, Callable[[Image.Image], Image.Image]]] = [
    ("smaller", lambda image: image.resize((96, 72))),
    ("larger", lambda image: image.resize((480, 360))),
    ("brighter", lambda image: ImageEnhance.Brightness(image).enhance(1.1)),
    ("text", lambda image: _with_mark(image)),
]


def _with_mark(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((255, 255, 255), (200, 165, 236, 176))
    return image


@pytest.fixture
def looks(tmp_path: Path) -> list[Look]:
    """``a.png``, its likes, and images of their own."""
    scene(1).save(tmp_path / "a.png")
    scene(1).save(tmp_path / "jpeg.jpg", quality=60)
    for name, change in CHANGES:
        change(scene(1)).save(tmp_path / f"{name}.png")
    for seed in range(2, 12):
        scene(seed).save(tmp_path / f"other{seed}.png")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")  # no edges: their fingerprints are equal
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return [look_at(path) for path in sorted(tmp_path.iterdir())]


def test_likes_are_found_and_others_are_not(looks: list[Look]) -> None:
    assert [sorted(path.name for path in group) for group in equal_files(looks)] == [["a.png", "copy.png"]]
    (group,) = look_alikes(looks)
    names = {path.name for pair in group for path in (pair.first, pair.second)}
    alike = {"jpeg.jpg", *(f"{name}.png" for name, _ in CHANGES)}
    assert alike < names and len(names) == len(alike) + 1  # with one of the two equal files
    assert all(0 <= pair.distance <= DISTANCE for pair in group)
    assert look_alikes([look for look in looks if look.path.name in ("red.png", "blue.png")]) == []


def test_two_sides(looks: list[Look]) -> None:
    folder = looks[0].path.parent

    def records(*names: str) -> list[ImageRecord]:
        return [ImageRecord(folder, name, (240, 180), "", 0) for name in names]

    by_path = {look.path: look for look in looks}
    first = records("a.png", "jpeg.jpg", "other3.png", "other4.png", "gone.png")
    second = records("copy.png", "other4.png", "other5.png", "smaller.png")
    found = {pair.first.name: pair for pair in on_both_sides(first, second, by_path)}
    assert found.keys() == {"a.png", "jpeg.jpg", "other4.png"}
    assert found["a.png"] == Pair(folder / "a.png", folder / "copy.png", -1)
    assert found["other4.png"].first == found["other4.png"].second
    assert found["jpeg.jpg"].second.name in ("copy.png", "smaller.png") and not found["jpeg.jpg"].is_equal
    # likes within one side only are none on both
    assert on_both_sides(records("a.png", "smaller.png"), records("other3.png"), by_path) == []
    assert on_both_sides(records("a.png"), [], by_path) == []


def test_a_image_is_looked_at_upright(tmp_path: Path) -> None:
    scene(1).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(1).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", exif=exif, quality=95)
    upright, turned = look_at(tmp_path / "a.png"), look_at(tmp_path / "b.jpg")
    assert (upright.turned, turned.turned) == (False, True)
    assert (upright.fingerprint ^ turned.fingerprint).bit_count() <= DISTANCE
