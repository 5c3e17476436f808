"""The header reader against Pillow: the same size, or none."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data.image_header import Header, exif_orientation, read_header
from library.data.image_io import read_size

PIXELS = np.random.default_rng(1).integers(0, 256, (21, 34, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: int | None) -> Image.Exif:
    found = Image.Exif()
    found[0x010F] = "maker of the camera"  # before and after the orientation
    if orientation is not None:
        found[0x0112] = orientation
    found[0x0131] = "some software"
    return found


def encoded(format: str, image: Image.Image = IMAGE, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def header(folder: Path, content: bytes) -> Header:
    (folder / "a").write_bytes(content)
    return read_header(folder / "a")


def seen_by_pillow(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).size


#: plain files of which the reader must answer
PLAIN = {
    "png": ("PNG", {}),
    "png interlaced": ("PNG", {"interlace": 1}),
    "jpeg": ("JPEG", {}),
    "jpeg progressive": ("JPEG", {"progressive": True}),
    "jpeg restarts": ("JPEG", {"restart_marker_blocks": 1}),
    "jpeg icc": ("JPEG", {"icc_profile": bytes(200_000), "comment": b"x" * 5000}),
    "webp lossy": ("WEBP", {}),
    "webp lossless": ("WEBP", {"lossless": True}),
    "webp icc": ("WEBP", {"icc_profile": bytes(20_000)}),
}


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_files_are_answered_and_as_pillow_sees_them(tmp_path: Path, kind: str, orientation: int | None) -> None:
    format, how = PLAIN[kind]
    if orientation is not None:
        how = {**how, "exif": exif(orientation)}
    content = encoded(format, **how)
    assert header(tmp_path, content) == Header(seen_by_pillow(content), whole=True)
    # lacking only the end
    assert not header(tmp_path, content[:-20]).whole


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_modes_of_png(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16)) if mode == "I;16" else IMAGE.convert(mode)
    assert header(tmp_path, encoded("PNG", image)) == Header((34, 21), whole=True)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_modes_of_jpeg(tmp_path: Path, mode: str) -> None:
    assert header(tmp_path, encoded("JPEG", IMAGE.convert(mode))) == Header((34, 21), whole=True)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "MPO"])
def test_several_frames(tmp_path: Path, format: str) -> None:
    content = encoded(format, save_all=True, append_images=[IMAGE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    assert header(tmp_path, content) == Header((34, 21), whole=True)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
@pytest.mark.parametrize("described", [True, False])
def test_what_only_xmp_tells_is_left_to_pillow(tmp_path: Path, format: str, described: bool) -> None:
    """Cameras' and editors' files may hold the orientation there, and nowhere else."""
    content = encoded(format, xmp=XMP, **({"exif": exif(None)} if described else {}))
    assert header(tmp_path, content) == Header(None, whole=True)
    assert read_size(tmp_path / "a") == seen_by_pillow(content) == (21, 34)


def test_other_formats_are_left_to_pillow(tmp_path: Path) -> None:
    for format in ("BMP", "GIF", "TIFF"):
        assert header(tmp_path, encoded(format)) == Header(None, whole=False)
        assert read_size(tmp_path / "a") == (34, 21)
    assert header(tmp_path, b"") == Header(None, whole=False)


def test_a_damaged_png_header_is_left_to_pillow(tmp_path: Path) -> None:
    content = bytearray(encoded("PNG"))
    content[19] ^= 1  # the width; its checksum no longer fits
    assert header(tmp_path, bytes(content)) == Header(None, whole=True)


def test_a_huge_length_takes_no_memory(tmp_path: Path) -> None:
    start = encoded("PNG")[:33]
    content = start + struct.pack(">I4s", 0xFFFFFFF0, b"eXIf") + b"MM\0*\0\0\0\x08"
    assert header(tmp_path, content).size is None


def test_a_chunk_beyond_the_first_window(tmp_path: Path) -> None:
    content = encoded("PNG", exif=exif(6))
    text = b"Comment\0" + b"x" * 10_000
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    content = content[:33] + chunk + content[33:]
    assert header(tmp_path, content).size == seen_by_pillow(content) == (21, 34)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_exif_of_both_byte_orders(order: str, prefix: bytes) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 8, 0)
    block = prefix + mark + struct.pack(f"{order}IH", 8, 1) + entry
    assert exif_orientation(block) == 8
    for length in range(len(block)):
        assert exif_orientation(block[:length]) is None
    as_text = struct.pack(f"{order}HHI4s", 0x0112, 2, 1, b"8\0\0\0")
    assert exif_orientation(prefix + mark + struct.pack(f"{order}IH", 8, 1) + as_text) is None


@pytest.mark.parametrize("kind", PLAIN)
def test_of_damaged_files_pillow_sees_the_same_or_nothing(tmp_path: Path, kind: str) -> None:
    """Bytes of the first kilobyte changed at random: no other size than Pillow's, and no other error than none."""
    rng = np.random.default_rng(3)
    format, how = PLAIN[kind]
    content = encoded(format, exif=exif(6), **how)
    answered = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 1000), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        found = header(tmp_path, bytes(damaged))
        if found.size is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(tmp_path / "a") as image:
                    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                    expected = image.size[::-1] if turned else image.size
        except Exception:
            continue
        assert found.size == expected
        answered += 1
    assert answered > 8
