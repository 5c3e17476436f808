"""Reading pictures: sizes from headers, pixels as RGB with the EXIF orientation applied, resizing and cropping."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height

#: what Pillow raises for damaged files, beside OSError
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error)


def read_size(path: Path) -> tuple[int, int]:
    """(W, H) in pixels as the picture is seen, from the header alone.

    Raises:
        UserError: not a picture, or empty.
    """
    with _open(path) as image:
        width, height = image.size
        turned = _orientation(image) in _TURNED
    if width < 1 or height < 1:
        raise UserError(f"{path}: the picture is empty ({width}x{height}); remove or replace it")
    return (height, width) if turned else (width, height)


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright; transparency is laid on white, 16 bit is scaled to 8.

    Raises:
        UserError: not a picture, or cut short.
    """
    with _open(path) as image:
        orientation = _orientation(image)
        try:
            pixels = np.asarray(_to_rgb(image))
        except _DAMAGED as error:
            raise UserError(f"{path}: the picture cannot be read ({error}); remove or replace it") from None
    return _upright(pixels, orientation)


def _open(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture; remove or replace it") from None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the picture cannot be read ({error}); remove or replace it") from None


def _orientation(image: Image) -> int:
    """EXIF orientation, 1 to 8, from what precedes the pixels; 1 where there is none or it is damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look for it behind the pixels
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DAMAGED:
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror (H, W, 3) by an EXIF orientation (Exif 2.32, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)  # 5: mirrored on the diagonal
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.float32) / 257.0
        return images.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = images.new("RGBA", image.size, "white")
        return images.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Fitted:
    """A picture resized and cropped to its bucket."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    crop_ltrb: tuple[int, int, int, int]  # in the resized picture


def fit(
    pixels: np.ndarray,
    bucket: tuple[int, int],
    *,
    interpolation: str | None,
    crop_fraction: tuple[float, float] = (0.5, 0.5),
) -> Fitted:
    """Resize so that the picture just covers the bucket, then crop.

    Args:
        pixels: uint8 (H, W, 3).
        bucket: (W, H).
        interpolation: a published name; ``None``: area to shrink, lanczos to enlarge.
        crop_fraction: where the crop lies in what sticks out, left to right and top to bottom; 0.5 is the middle.
    """
    height, width = pixels.shape[:2]
    resized = covering_size((width, height), bucket)
    if resized != (width, height):
        pixels = resize(pixels, resized, interpolation)
    left, top, right, bottom = box = crop_box(resized, bucket, crop_fraction)
    return Fitted(np.ascontiguousarray(pixels[top:bottom, left:right]), box)


def crop_box(
    resized: tuple[int, int], bucket: tuple[int, int], fraction: tuple[float, float] = (0.5, 0.5)
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the bucket in the resized picture; for ``fraction`` see ``fit``."""
    left = round((resized[0] - bucket[0]) * fraction[0])
    top = round((resized[1] - bucket[1]) * fraction[1])
    return left, top, left + bucket[0], top + bucket[1]


def covering_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest (W, H) of the picture's aspect ratio that covers the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str | None) -> np.ndarray:
    """Resize uint8 (H, W, 3) to ``size`` (W, H); all but nearest widen their kernel to shrink, so none aliases."""
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
        import cv2

        cv2.setNumThreads(0)  # pictures are read in parallel already, and its threads do not survive a fork
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(pixels).resize(size, filters[interpolation]))
