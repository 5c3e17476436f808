"""Read images: sizes from headers, pixels as RGB with the EXIF orientation applied; resize and crop them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data.image_header import TURNED, read_header
from library.errors import UserError
from library.files.regular import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

#: avif and jxl need the packages of PLUGINS; images of these kinds are never skipped silently
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")


def is_image_name(name: str) -> bool:
    """Whether a file in a data set's folder is one of its images; hidden files are not."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


#: kind of image that not every installation reads -> package to install
PLUGINS = {"AVIF": "pillow-avif-plugin", "JXL": "pillow-jxl-plugin"}

#: accepted formats by content, whatever the name; some other readers of Pillow start programs
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JXL")

_EXIF_ORIENTATION = 0x0112

#: larger images are left to Pillow, which warns of so many pixels and refuses twice as many
_MANY_PIXELS = 89_000_000

#: bytes of text in one PNG
_MOST_TEXT = 1 << 30

#: radius in pixels of the widest kernel, lanczos, when an image is enlarged
_KERNEL = 4

#: errors of Pillow on damaged files, beside OSError
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, RuntimeError, struct.error)


def read_size(path: Path | str) -> tuple[int, int]:
    """Return (W, H) of the upright image in pixels, from the header and the end of the file.

    A file with an unusual end is decoded, to distinguish trailing bytes from a truncated image.
    Damage in between shows only when the image is read.

    Raises:
        UserError: not an image, empty, cut short, or of a kind that needs a package.
    """
    try:
        header = read_header(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if header.size is not None and header.whole and header.size[0] * header.size[1] <= _MANY_PIXELS:
        return header.size
    with _open(path) as image:
        width, height = image.size
        turned = _orientation(image) in TURNED
        if width < 1 or height < 1:
            raise UserError(f"{path}: the image is empty ({width}x{height}); remove or replace it")
        if not header.whole:
            try:
                image.load()
            except _DAMAGED as error:
                raise _unreadable(path, error) from None
    return (height, width) if turned else (width, height)


def read_image(path: Path | str, *, background: str = "white") -> np.ndarray:
    """Read uint8 (H, W, 3) RGB, upright; the first frame; transparency on ``background``, 16 bit scaled to 8.

    Raises:
        UserError: not an image, empty, cut short, or of a kind that needs a package.
    """
    return _decode(Path(path), lambda image: [_to_rgb(image, background)])[0]


def read_image_and_alpha(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read as ``read_image``, and the opacity, uint8 (H, W): 0 is transparent; 255 without an alpha channel.

    Raises:
        UserError: not an image, or cut short.
    """
    pixels, alpha = _decode(path, lambda image: [_to_rgb(image), _alpha(image)])
    return pixels, alpha


def _decode(path: Path, convert: Callable[[Image], list[Image]]) -> list[np.ndarray]:
    with _open(path) as image:
        orientation = _orientation(image)
        try:
            made = [np.asarray(one) for one in convert(image)]
        except _DAMAGED as error:
            raise _unreadable(path, error) from None
    return [_upright(pixels, orientation) for pixels in made]


def _open(path: Path | str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with open(open_regular(path), "rb") as file:
            start = file.read(32)
        if not start:
            raise UserError(f"{path}: the file is empty (0 bytes); remove or replace it")
        kind = _kind(start)
        if kind == "HEIC":
            raise UserError(f"{path}: a HEIC image, which is not supported; convert it to PNG or JPEG")
        if kind is not None and not _can_read(kind):
            raise UserError(f"{path}: {kind} images need a package: pip install {PLUGINS[kind]}")
        _expect_large_images()
        return Image.open(path, formats=_formats())
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; remove or replace it") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(f"{path}: has more than {limit:.0f} million pixels; make it smaller") from None
    except _DAMAGED as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path | str, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"{path}: the image cannot be read ({reason}); remove or replace it")


def _kind(start: bytes) -> str | None:
    """Recognize kinds that need a plugin, or have none, by the file's first 32 bytes."""
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    if start[4:8] == b"ftyp":
        brands = {start[8:12], *(start[i : i + 4] for i in range(16, min(len(start), start[3]), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}:
            return "HEIC"
    return None


@functools.cache
def _can_read(kind: str) -> bool:
    """Whether Pillow can open a kind, after importing its plugin where Pillow itself cannot."""
    from PIL import Image

    Image.init()  # first, because Pillow would otherwise override the plugin's reader
    modules = {"AVIF": ("PIL._avif", "pillow_avif"), "JXL": ("pillow_jxl",)}[kind]
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            return True
    return False


@functools.cache
def _expect_large_images() -> None:
    """Pillow warns of an attack above 89 million pixels, and refuses twice as many, and PNGs with much text.

    These are the user's own files: the warnings are off, and text, such as a workflow with images in it, may be long.
    """
    from PIL import Image, PngImagePlugin

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MOST_TEXT


def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image) -> int:
    """Return the EXIF orientation, 1 to 8, from data before the pixels; 1 if it is missing or damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole image to look for it behind the pixels
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # decoded upright already (ISO/IEC 18181-1), unless the plugin restored the JPEG file inside
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DAMAGED:
        return 1


def read_orientation(path: Path | str) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright. Raises UserError: the image cannot be opened."""
    with _open(path) as image:
        return _orientation(image)


def has_alpha(path: Path | str) -> bool:
    """Whether an image has an alpha channel, or one transparent colour. Raises UserError: it cannot be opened."""
    with contextlib.suppress(OSError), open(open_regular(path), "rb") as file:
        if file.read(3) == b"\xff\xd8\xff":
            return False  # JPEG has none; a shortcut, as there may be a hundred thousand
    with _open(path) as image:
        return _has_alpha(image)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip (H, W) or (H, W, 3) by an EXIF orientation (Exif 2.32, tag 0x0112)."""
    if orientation in TURNED:
        pixels = pixels.swapaxes(0, 1)  # 5: mirrored on the diagonal
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _has_alpha(image: Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _alpha(image: Image) -> Image:
    from PIL import Image as images

    if not _has_alpha(image):
        return images.new("L", image.size, 255)
    if image.mode.startswith("I"):  # 16-bit grey, of which one value is transparent; Pillow would not convert it
        return images.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _to_rgb(image: Image, background: str = "white") -> Image:
    from PIL import Image as images

    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip at 255 instead of scaling
        values = np.asarray(image)
        grey = (values / np.float32(257)).round().clip(0, 255).astype(np.uint8)
        if "transparency" in image.info:  # one value is transparent
            grey[values == image.info["transparency"]] = images.new("L", (1, 1), background).getpixel((0, 0))
        return images.fromarray(grey).convert("RGB")
    if _has_alpha(image):
        image = image.convert("RGBA")
        behind = images.new("RGBA", image.size, background)
        return images.alpha_composite(behind, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Fitted:
    """An image resized and cropped to its bucket."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    crop_ltrb: tuple[int, int, int, int]  # in the resized image


def fit(pixels: np.ndarray, bucket: tuple[int, int], *, interpolation: str | None) -> Fitted:
    """Resize so that the image just covers the bucket, then crop the middle.

    Args:
        pixels: uint8 (H, W, 3).
        bucket: (W, H).
        interpolation: a published name; ``None``: area to shrink, lanczos to enlarge.
    """
    resized = covering_size((pixels.shape[1], pixels.shape[0]), bucket)
    box = crop_box(resized, bucket)
    return Fitted(cut(pixels, resized, box, interpolation), box)


def cut(
    pixels: np.ndarray, resized: tuple[int, int], box: tuple[int, int, int, int], interpolation: str | None
) -> np.ndarray:
    """Resize uint8 (H, W) or (H, W, 3) to ``resized`` (W, H), then crop the ``box`` (left, top, right, bottom)."""
    if resized[0] * resized[1] > _MANY_PIXELS:
        pixels, resized, box = _surroundings(pixels, resized, box)
    if resized != (pixels.shape[1], pixels.shape[0]):
        pixels = resize(pixels, resized, interpolation)
    left, top, right, bottom = box
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def _surroundings(
    pixels: np.ndarray, resized: tuple[int, int], box: tuple[int, int, int, int]
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int, int, int]]:
    """Return the part of an image that the box needs, its resized size, and the box in it.

    It is for images so narrow that the whole, resized to a bucket's width, would not fit into memory.
    """
    starts, ends, offsets, sides = [0, 0], [0, 0], [0, 0], [0, 0]
    for axis, length in enumerate((pixels.shape[1], pixels.shape[0])):
        scale = resized[axis] / length
        starts[axis] = max(0, math.floor(box[axis] / scale) - _KERNEL)
        ends[axis] = min(length, math.ceil(box[axis + 2] / scale) + _KERNEL)
        offsets[axis] = round(starts[axis] * scale)
        sides[axis] = round(ends[axis] * scale) - offsets[axis]
    (x, y), (left, top, right, bottom) = offsets, box
    part = pixels[starts[1] : ends[1], starts[0] : ends[0]]
    return np.ascontiguousarray(part), (sides[0], sides[1]), (left - x, top - y, right - x, bottom - y)


def cut_mask(mask: np.ndarray, resized: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """``cut`` for weights, uint8 (H, W): whatever the image's interpolation, edges neither ring nor overshoot."""
    shrinks = resized[0] <= mask.shape[1] and resized[1] <= mask.shape[0]
    return cut(mask, resized, box, "area" if shrinks else "bilinear")


def crop_box(
    resized: tuple[int, int], bucket: tuple[int, int], fraction: tuple[float, float] | None = None
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the bucket in the resized image.

    Args:
        fraction: position of the crop in the excess, left to right and top to bottom; ``None``: the middle, where an
            odd number of pixels cuts one more at the right and the bottom, as published.
    """
    extra = (resized[0] - bucket[0], resized[1] - bucket[1])
    if fraction is None:
        left, top = (pixels // 2 for pixels in extra)
    else:
        left, top = (round(pixels * share) for pixels, share in zip(extra, fraction, strict=True))
    return left, top, left + bucket[0], top + bucket[1]


def covering_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (W, H) of the image's aspect ratio that covers the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str | None) -> np.ndarray:
    """Resize uint8 (H, W) or (H, W, 3) to ``size`` (W, H).

    All kernels but nearest widen when they shrink, so none aliases.
    """
    from PIL import Image

    filters = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "linear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "cubic": Image.Resampling.BICUBIC,
        "box": Image.Resampling.BOX,
        "lanczos": Image.Resampling.LANCZOS,
    }
    if interpolation is None:
        shrinks = size[0] <= pixels.shape[1] and size[1] <= pixels.shape[0]
        interpolation = "area" if shrinks else "lanczos"
    if interpolation == "area":
        # exact area weights; Pillow's box takes whole source pixels only
        cv2 = opencv()
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(pixels).resize(size, filters[interpolation]))


def opencv() -> Any:
    """Return OpenCV without threads: images are read in parallel already, and its threads do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    return cv2
