"""Sizes and pixels of all sorts of picture files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data.image_io import covering_size, cut_mask, fit, read_image, read_image_and_alpha, read_size, resize
from library.errors import UserError

GRADIENT = np.stack(np.broadcast_arrays(np.arange(9) * 20, np.arange(6)[:, None] * 40, 7), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_exif_orientation(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{ending}"
    Image.fromarray(GRADIENT).save(path, exif=exif, lossless=True)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert read_size(path) == ((6, 9) if orientation >= 5 else (9, 6))
    assert np.array_equal(read_image(path), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_orientation(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(GRADIENT).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x12" * 5)
    assert read_size(path) == (9, 6)
    assert read_image(path).shape == (6, 9, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 5), 100 * 257, np.uint16)).save(path)
    else:
        Image.new("RGB", (5, 4), (100, 100, 100) if mode != "1" else (255, 255, 255)).convert(mode).save(path)
    pixels = read_image(path)
    assert pixels.shape == (4, 5, 3)
    assert pixels.dtype == np.uint8
    assert abs(int(pixels[0, 0, 0]) - (255 if mode == "1" else 100)) <= 3


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "b.png", transparency=1)
    assert (read_image(tmp_path / "a.png") == 255).all()
    assert (read_image(tmp_path / "b.png") == 255).all()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_opacity_is_read_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    opacity = np.arange(54, dtype=np.uint8).reshape(6, 9)
    path = tmp_path / "a.png"
    Image.fromarray(np.dstack([GRADIENT, opacity])).save(path, exif=exif)
    pixels, alpha = read_image_and_alpha(path)
    assert np.array_equal(alpha, {1: opacity, 3: opacity[::-1, ::-1], 6: np.rot90(opacity, -1)}[orientation])
    assert np.array_equal(pixels, read_image(path))


def test_opacity_of_all_sorts(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.bmp", "a.png"):
        Image.fromarray(GRADIENT).save(tmp_path / name)
        assert (read_image_and_alpha(tmp_path / name)[1] == 255).all()
    Image.fromarray(np.full((4, 5), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image_and_alpha(tmp_path / "deep.png")[1] == 255).all()
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "b.png", transparency=1)
    assert (read_image_and_alpha(tmp_path / "b.png")[1] == 0).all()
    Image.new("LA", (3, 3), (9, 77)).save(tmp_path / "c.png")
    assert (read_image_and_alpha(tmp_path / "c.png")[1] == 77).all()


def test_transparency_may_be_laid_on_black(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", background="black") == 0).all()


@pytest.mark.parametrize("resized", [(6, 4), (48, 32), (13, 40)])
def test_masks_stay_between_their_values(resized: tuple[int, int]) -> None:
    mask = np.full((16, 24), 50, np.uint8)
    mask[:, 12:] = 200
    made = cut_mask(mask, resized, (0, 0, *resized))
    assert made.shape == resized[::-1]
    assert (made.min(), made.max()) == (50, 200)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("<html>")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:4000])
    with pytest.raises(UserError, match="text.png: not a picture"):
        read_size(text)
    assert read_size(cut) == (64, 64)  # its header is whole
    with pytest.raises(UserError, match="cut.png: the picture cannot be read"):
        read_image(cut)


def test_the_resized_picture_just_covers_the_bucket() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(int(n) for n in rng.integers(10, 3000, 2))
        bucket = tuple(int(n) * 64 for n in rng.integers(1, 16, 2))
        width, height = covering_size(size, bucket)
        assert width >= bucket[0] and height >= bucket[1]
        assert width == bucket[0] or height == bucket[1]


def test_the_crop_is_in_the_middle() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :10], pixels[:, 10:20], pixels[:, 20:] = 1, 2, 3
    middle = fit(pixels, (10, 10), interpolation=None)
    assert middle.crop_ltrb == (10, 0, 20, 10)
    assert (middle.pixels == 2).all()


@pytest.mark.parametrize("name", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box", None])
@pytest.mark.parametrize("size", [(4, 3), (40, 30)])
def test_interpolations_keep_a_flat_colour(name: str | None, size: tuple[int, int]) -> None:
    resized = resize(np.full((6, 8, 3), 77, np.uint8), size, name)
    assert resized.shape == (size[1], size[0], 3)
    assert (resized == 77).all()


def test_default_interpolation_is_area_to_shrink_and_lanczos_to_enlarge() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert np.array_equal(resize(pixels, (10, 10), None), resize(pixels, (10, 10), "area"))
    exact = pixels.reshape(10, 2, 10, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize(pixels, (10, 10), None) - exact).max() <= 0.5
    assert np.array_equal(resize(pixels, (30, 30), None), resize(pixels, (30, 30), "lanczos"))
