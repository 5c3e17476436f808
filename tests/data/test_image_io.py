"""Sizes and pixels of all sorts of image files."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data import image_io
from library.data.image_io import (
    _can_read,
    covering_size,
    crop_box,
    cut,
    cut_mask,
    fit,
    has_alpha,
    read_image,
    read_image_and_alpha,
    read_orientation,
    read_size,
    resize,
)
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
    assert read_orientation(path) == orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_orientation(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(GRADIENT).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x12" * 5)
    assert read_size(path) == (9, 6)
    assert read_image(path).shape == (6, 9, 3)


FLAT = (100, 100, 100)


def save_mode(folder: Path, mode: str) -> Path:
    """A flat image of 5x4 pixels, about 100 grey."""
    path = folder / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (5, 4), FLAT if mode != "1" else (255, 255, 255)).convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = save_mode(tmp_path, mode)
    with Image.open(path) as image:
        assert image.mode == mode
    pixels = read_image(path)
    assert read_size(path) == (5, 4)
    assert pixels.shape == (4, 5, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (255 if mode == "1" else 100)).max() <= 3


def png16(colour: int, values: np.ndarray, *, size: tuple[int, int] | None = None) -> bytes:
    """A 16-bit PNG of colour type ``colour``; ``values`` uint16 (H, W, C). Pillow writes only grey ones.

    Args:
        size: (W, H) to say in the header instead.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = size or values.shape[1::-1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_is_scaled_to_8(tmp_path: Path, colour: int, channels: int) -> None:
    grey = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6, 1)
    values = np.repeat(grey, channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(png16(colour, values))
    assert read_size(tmp_path / "a.png") == (6, 4)
    # Pillow takes the high byte of colours, which is up to one less
    assert np.abs(read_image(tmp_path / "a.png") - grey / 257.0).max() <= 1.0


def test_16_bit_grey_keeps_its_transparent_value(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("LA", (3, 3), (0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (3, 3), (9, 8, 7)).save(tmp_path / "c.png", transparency=(9, 8, 7))
    Image.new("L", (3, 3), 9).save(tmp_path / "d.png", transparency=9)
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "e.webp", lossless=True)
    for path in sorted(tmp_path.iterdir()):
        assert (read_image(path) == 255).all(), path.name


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


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (200, 0, 100, 51)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [244, 204, 224]  # 0.2 * colour + 0.8 * 255


def test_palette_with_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (3, 1))
    palette.putdata([0, 1, 2])
    palette.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "one.png", transparency=1)
    palette.save(tmp_path / "each.png", transparency=bytes([255, 0, 128]))
    assert read_image(tmp_path / "one.png")[0].tolist() == [[0, 0, 0], [255] * 3, [40, 50, 60]]
    black, clear, half = read_image(tmp_path / "each.png")[0].tolist()
    assert (black, clear) == ([0, 0, 0], [255] * 3)
    assert half == pytest.approx([147, 152, 157], abs=1)


@pytest.mark.parametrize("ending", ["png", "webp", "avif"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "avif" and not _can_read("AVIF"):
        pytest.skip("Pillow reads no AVIF here")
    first, *others = [Image.new("RGB", (32, 24), colour) for colour in ("red", "green", "blue")]
    first.save(path, save_all=True, append_images=others, lossless=True)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert read_size(path) == (32, 24)
    assert np.abs(read_image(path).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.jxl"])
def test_the_content_decides_not_the_name(tmp_path: Path, format: str, name: str) -> None:
    Image.new("RGB", (8, 6), (200, 40, 90)).save(tmp_path / name, format)
    assert read_size(tmp_path / name) == (8, 6)
    assert np.abs(read_image(tmp_path / name).astype(int) - [200, 40, 90]).max() <= 4


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
ENDINGS = ["png", "jpg", "webp", "bmp", "avif"]


def noise(folder: Path, ending: str) -> Path:
    if ending == "avif" and not _can_read("AVIF"):
        pytest.skip("Pillow reads no AVIF here")
    NOISE.save(folder / f"cut.{ending}")
    return folder / f"cut.{ending}"


@pytest.mark.parametrize("share", [0.3, 0.9, None])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_image_cut_short_is_named(tmp_path: Path, ending: str, share: float | None) -> None:
    path = noise(tmp_path, ending)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share) if share else 20])
    for read in (read_size, read_image):
        with pytest.raises(UserError, match=f"cut.{ending}: (the image cannot be read|not an image)"):
            read(path)


@pytest.mark.parametrize("tail", [b"\0" * 7, b"<!-- served by -->" * 300])
@pytest.mark.parametrize("ending", ENDINGS)
def test_bytes_behind_a_whole_image_are_no_harm(tmp_path: Path, ending: str, tail: bytes) -> None:
    path = noise(tmp_path, ending)
    before = read_image(path)
    path.write_bytes(path.read_bytes() + tail)
    assert read_size(path) == (64, 64)
    assert np.array_equal(read_image(path), before)


@pytest.mark.parametrize("read", [read_size, read_image])
def test_what_is_no_image_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "random.webp").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("text.png", "random.webp", "script.jpg"):
        with pytest.raises(UserError, match=f"{name}: not an image; remove or replace it"):
            read(tmp_path / name)
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty.png: the file is empty \(0 bytes\)"):
        read(tmp_path / "empty.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"link.png: the image cannot be read \(No such file"):
        read(tmp_path / "link.png")


@pytest.mark.parametrize("read", [read_size, read_image])
def test_too_many_pixels_are_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "a.png").write_bytes(png16(0, np.zeros((1, 1, 1), np.uint16), size=(20_000, 20_000)))
    with pytest.raises(UserError, match=r"a.png: has more than 179 million pixels; make it smaller"):
        read(tmp_path / "a.png")


def test_large_images_are_no_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # so that a hundred are what 100 million are
    image_io._expect_large_images.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert read_image(tmp_path / "a.png").shape == (10, 10, 3)
    assert not said


# ---- kinds that need a package ----

JXL = [b"\xff\x0a" + b"\0" * 40, b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40]
AVIF = [
    b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + b"\0" * 40,
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + b"\0" * 40,
]


@pytest.mark.parametrize("read", [read_size, read_image])
@pytest.mark.parametrize(
    ("kind", "content", "package"),
    [*(("JXL", c, "pillow-jxl-plugin") for c in JXL), *(("AVIF", c, "pillow-avif-plugin") for c in AVIF)],
)
def test_a_missing_package_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], object],
    kind: str,
    content: bytes,
    package: str,
) -> None:
    for module in ("PIL._avif", "pillow_avif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)  # an import fails
    _can_read.cache_clear()
    (tmp_path / "a.png").write_bytes(content)
    try:
        with pytest.raises(UserError, match=f"a.png: {kind} images need a package: pip install {package}$"):
            read(tmp_path / "a.png")
    finally:
        _can_read.cache_clear()


def test_heic_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    with pytest.raises(UserError, match=r"IMG_1.jpg: a HEIC image, .*convert it"):
        read_size(tmp_path / "IMG_1.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["avif", "jxl"])
def test_orientation_of_kinds_that_need_a_package(tmp_path: Path, ending: str, orientation: int) -> None:
    if not _can_read(ending.upper()):
        pytest.skip(f"Pillow reads no {ending} here")
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:12, :16] = 255  # one corner
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path, exif=exif.tobytes(), quality=95)
    assert read_size(path) == read_image(path).shape[1::-1]
    if ending == "avif":  # the others' encoders do not set the orientation that counts
        assert read_size(path) == ((24, 32) if orientation >= 5 else (32, 24))
        with Image.open(path) as image:
            assert np.array_equal(read_image(path), np.asarray(ImageOps.exif_transpose(image)))


@pytest.fixture
def jxl(tmp_path: Path) -> Path:
    if not _can_read("JXL"):
        pytest.skip("Pillow reads no jxl here")
    return tmp_path / "a.jxl"


def test_jpeg_xl_pixels(jxl: Path) -> None:
    Image.fromarray(GRADIENT).save(jxl, lossless=True)
    assert read_size(jxl) == (9, 6) and not has_alpha(jxl)
    assert np.array_equal(read_image(jxl), GRADIENT)
    Image.fromarray(GRADIENT[:, :, 0]).save(jxl, lossless=True)
    assert np.array_equal(read_image(jxl), np.repeat(GRADIENT[:, :, :1], 3, axis=2))


def test_jpeg_xl_alpha(jxl: Path) -> None:
    alpha = GRADIENT[:, :, 1]
    Image.fromarray(np.dstack([GRADIENT, alpha])).save(jxl, lossless=True)
    assert has_alpha(jxl)
    assert np.array_equal(read_image_and_alpha(jxl)[1], alpha)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_inside_jpeg_xl_is_turned_as_the_jpeg_was(jxl: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = jxl.with_suffix(".jpg")
    Image.fromarray(GRADIENT).save(jpeg, exif=exif, quality=95)
    with Image.open(jpeg) as image:
        image.save(jxl, lossless_jpeg=True)
    assert read_size(jxl) == read_size(jpeg)
    assert np.array_equal(read_image(jxl), read_image(jpeg))


def test_a_torn_jpeg_xl_file_is_named(jxl: Path) -> None:
    Image.fromarray(GRADIENT).save(jxl, lossless=True)
    jxl.write_bytes(jxl.read_bytes()[:-12])
    with pytest.raises(UserError, match="a.jxl: the image cannot be read"):
        read_image(jxl)


def test_the_resized_image_just_covers_the_bucket() -> None:
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


def test_of_an_odd_number_of_pixels_one_more_is_cut_off_at_the_end() -> None:
    """As published; half of it is not rounded to even, which moved every other crop by a pixel."""
    for extra in range(12):
        assert crop_box((64 + extra, 64), (64, 64)) == (extra // 2, 0, extra // 2 + 64, 64)
        assert crop_box((64, 64 + extra), (64, 64)) == (0, extra // 2, 64, extra // 2 + 64)


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


@pytest.mark.parametrize(
    ("name", "mode", "settings", "expected"),
    [
        ("a.png", "RGB", {}, False),
        ("a.png", "RGBA", {}, True),
        ("a.png", "LA", {}, True),
        ("a.png", "P", {}, False),
        ("a.png", "P", {"transparency": 0}, True),
        ("a.jpg", "RGB", {}, False),
        ("a.webp", "RGBA", {"lossless": True}, True),
    ],
)
def test_alpha_channels(tmp_path: Path, name: str, mode: str, settings: dict[str, object], expected: bool) -> None:
    image = Image.fromarray(GRADIENT).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)  # WebP leaves away an alpha channel that says nothing
    image.save(tmp_path / name, **settings)
    assert has_alpha(tmp_path / name) == expected


def test_the_alpha_channel_of_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("none")
    for name in ("a.png", "gone.png"):
        with pytest.raises(UserError, match=name):
            has_alpha(tmp_path / name)


# ---- images of no image's shape ----


@pytest.mark.parametrize("size", [(400, 3), (3, 401)])
def test_of_a_narrow_image_only_the_crop_is_resized(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out as if all had been, to within a pixel's fraction."""
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))  # (H, W)
    pixels = np.repeat((ramp % 256).astype(np.uint8)[:, :, None] // 2, 3, axis=2)
    bucket = (64, 96)
    resized = covering_size(size, bucket)
    for box in ((0, 0, *bucket), (resized[0] - 64, resized[1] - 96, *resized)):
        whole = cut(pixels, resized, box, "bilinear")
        with monkeypatch.context() as patch:
            patch.setattr(image_io, "_MANY_PIXELS", 1000)
            part = cut(pixels, resized, box, "bilinear")
        assert part.shape == whole.shape == (96, 64, 3)
        assert np.abs(part.astype(int) - whole).max() <= 2


def test_a_line_of_20_000_pixels_takes_little_memory() -> None:
    fitted = fit(np.full((1, 20_000, 3), 9, np.uint8), (1024, 256), interpolation=None)  # the whole: 4 GB
    assert fitted.pixels.shape == (256, 1024, 3) and (fitted.pixels == 9).all()
