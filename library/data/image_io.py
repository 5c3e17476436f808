"""Reading pictures: sizes from headers, pixels as RGB with the EXIF orientation applied, resizing and cropping."""

from __future__ import annotations

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


def read_size(path: Path) -> tuple[int, int]:
    """(W, H) in pixels as the picture is seen, from the header alone.

    Raises:
        UserError: not a picture, or empty.
    """
    image = _open(path)
    with image:
        width, height = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    if width < 1 or height < 1:
        raise UserError(f"{path}: the picture is empty ({width}x{height}); remove or replace it")
    return (height, width) if turned else (width, height)


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright; transparency is laid on white, 16 bit is scaled to 8.

    Raises:
        UserError: not a picture, or cut short.
    """
    from PIL import ImageOps

    try:
        with _open(path) as opened:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(opened)))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: the picture cannot be read ({error}); remove or replace it") from None


def _open(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture; remove or replace it") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the picture cannot be read ({error}); remove or replace it") from None


def _to_rgb(image: Image) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow would clip at 255 instead of scaling
        values = np.asarray(image, dtype=np.float32)
        values = values / 257.0 if values.max(initial=0) > 255 else values
        return images.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
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
    left = round((resized[0] - bucket[0]) * crop_fraction[0])
    top = round((resized[1] - bucket[1]) * crop_fraction[1])
    right, bottom = left + bucket[0], top + bucket[1]
    return Fitted(np.ascontiguousarray(pixels[top:bottom, left:right]), (left, top, right, bottom))


def covering_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest (W, H) of the picture's aspect ratio that covers the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str | None) -> np.ndarray:
    """Resize uint8 (H, W, 3) to ``size`` (W, H)."""
    import cv2
    from PIL import Image

    if interpolation is None:
        shrinks = size[0] <= pixels.shape[1] and size[1] <= pixels.shape[0]
        interpolation = "area" if shrinks else "lanczos"
    if interpolation == "lanczos":
        # Pillow's kernel widens when it shrinks; OpenCV's does not, and aliases
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    methods = {
        "nearest": cv2.INTER_NEAREST,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
        "box": cv2.INTER_AREA,
    }
    return cv2.resize(pixels, size, interpolation=methods[interpolation])
