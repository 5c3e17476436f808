"""Latent caches of every published family: what is written is the published layout, and published files are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from library.architectures.formats import LatentFormat
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.data.cache_format import (
    CachedLatents,
    Stamp,
    array_suffix,
    cache_path,
    read_cache,
    read_sample,
    write_cache,
)

PUBLISHED = json.loads((Path(__file__).parent / "data" / "latent_caches.json").read_text())["latents"]
BUCKET = (96, 64)  # W, H
SIZE = (100, 70)


def channels_of(family: dict) -> int:
    return int(family["arrays"][0]["shape"][1:].split(",")[0])


def format_of(family: dict) -> LatentFormat:
    return LatentFormat(
        channels=channels_of(family),
        stride=family["stride"],
        scale=1.0,
        shift=0.0,
        cache_suffix=family["suffix"],
        multi_resolution=family["multi_resolution"],
    )


def expected(family: dict) -> dict[str, tuple[tuple[int, ...], str]]:
    """Array name -> shape and dtype of a file for BUCKET, worked out from the table's own words."""
    width, height = BUCKET
    stride = family["stride"]
    values = {f"H/{stride}": height // stride, f"W/{stride}": width // stride, "H": height, "W": width}
    found = {}
    for array in family["arrays"]:
        name = array["name"]
        for word, value in values.items():
            name = name.replace("{" + word + "}", str(value))
        sides = [side.strip() for side in array["shape"].strip("()").split(",") if side.strip()]
        found[name] = (tuple(values[side] if side in values else int(side) for side in sides), array["dtype"])
    return found


@pytest.fixture(params=sorted(PUBLISHED))
def family(request: pytest.FixtureRequest) -> dict:
    return PUBLISHED[request.param]


def made(format: LatentFormat) -> CachedLatents:
    draw = np.random.default_rng(0).standard_normal
    shape = (format.channels, BUCKET[1] // format.stride, BUCKET[0] // format.stride)
    mask = np.random.default_rng(1).random((BUCKET[1], BUCKET[0]), dtype=np.float32)
    return CachedLatents(draw(shape, np.float32), draw(shape, np.float32), SIZE, (2, 3, 98, 67), mask)


def test_what_is_written(tmp_path: Path, family: dict) -> None:
    format = format_of(family)
    path = cache_path(tmp_path / "a.b.png", SIZE, format)
    assert path.name == f"a.b_0100x0070{family['suffix']}"
    write_cache(path, made(format), Stamp("x", (0, 0, 0, 0), "vae", BUCKET, None), format)
    with np.load(path, allow_pickle=False) as file:
        written = {n: (file[n].shape, str(file[n].dtype)) for n in file.files if not n.startswith("stamp")}
    assert written == expected(family)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("one_frame", [False, True])
def test_published_files_are_read(tmp_path: Path, family: dict, dtype: str, one_frame: bool) -> None:
    format, cached = format_of(family), made(format_of(family))
    path = cache_path(tmp_path / "a.png", SIZE, format)
    suffix = array_suffix(BUCKET, format)
    values = {
        "latents": cached.latents.astype(dtype),
        "latents_flipped": cached.latents_flipped.astype(dtype),
        "original_size": np.array(SIZE),
        "crop_ltrb": np.array(cached.crop_ltrb),
        "alpha_mask": cached.alpha_mask,
    }
    if one_frame:
        values |= {name: values[name][:, None] for name in ("latents", "latents_flipped")}
    arrays = {f"{name}{suffix}": v for name, v in values.items()}
    assert arrays.keys() == expected(family).keys()
    np.savez(path, **arrays, surplus=np.zeros(3))
    found, stamp = read_cache(path, BUCKET, format)
    assert stamp is None and found.original_size == SIZE and found.crop_ltrb == (2, 3, 98, 67)
    for flipped in (False, True):
        latents, mask = read_sample(path, BUCKET, format, flipped=flipped, alpha_mask=True)
        assert latents.dtype == mask.dtype == np.float32
        want = cached.latents_flipped if flipped else cached.latents
        assert np.array_equal(latents, want.astype(dtype).astype(np.float32))
        assert np.array_equal(mask, cached.alpha_mask[:, ::-1] if flipped else cached.alpha_mask)
    other = (BUCKET[1], BUCKET[0])
    assert read_cache(path, other, format) is None


def test_families_that_are_built_declare_it() -> None:
    for architecture, name in ((SD, "sd1_2"), (SDXL, "sdxl")):
        family = PUBLISHED[name]
        latent = architecture.latent
        assert (latent.cache_suffix, latent.stride, latent.channels, latent.multi_resolution) == (
            family["suffix"], family["stride"], channels_of(family), family["multi_resolution"],
        )  # fmt: skip
