"""Reading pictures: sizes from headers, pixels as RGB with the EXIF orientation applied, resizing and cropping."""

from __future__ import annotations

import struct
from collections.abc import Callable
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


def read_image(path: Path, *, background: str = "white") -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright; transparency is laid on ``background``, 16 bit is scaled to 8.

    Raises:
        UserError: not a picture, or cut short.
    """
    return _decode(path, lambda image: [_to_rgb(image, background)])[0]


def read_image_and_alpha(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What ``read_image`` gives, and its opacity, uint8 (H, W): 0 is transparent; 255 where there is no alpha channel.

    Raises:
        UserError: not a picture, or cut short.
    """
    pixels, alpha = _decode(path, lambda image: [_to_rgb(image), _alpha(image)])
    return pixels, alpha


def _decode(path: Path, convert: Callable[[Image], list[Image]]) -> list[np.ndarray]:
    with _open(path) as image:
        orientation = _orientation(image)
        try:
            made = [np.asarray(one) for one in convert(image)]
        except _DAMAGED as error:
            raise UserError(f"{path}: the picture cannot be read ({error}); remove or replace it") from None
    return [_upright(pixels, orientation) for pixels in made]


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
    """Turn and mirror (H, W) or (H, W, 3) by an EXIF orientation (Exif 2.32, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
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

    # 16-bit grey has no opacity that Pillow would know of
    if image.mode.startswith("I") or not _has_alpha(image):
        return images.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _to_rgb(image: Image, background: str = "white") -> Image:
    from PIL import Image as images

    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.float32) / 257.0
        return images.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if _has_alpha(image):
        image = image.convert("RGBA")
        behind = images.new("RGBA", image.size, background)
        return images.alpha_composite(behind, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Fitted:
    """A picture resized and cropped to its bucket."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    crop_ltrb: tuple[int, int, int, int]  # in the resized picture


def fit(pixels: np.ndarray, bucket: tuple[int, int], *, interpolation: str | None) -> Fitted:
    """Resize so that the picture just covers the bucket, then crop the middle.

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
    if resized != (pixels.shape[1], pixels.shape[0]):
        pixels = resize(pixels, resized, interpolation)
    left, top, right, bottom = box
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def cut_mask(mask: np.ndarray, resized: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """``cut`` for weights, uint8 (H, W): whatever the picture's interpolation, edges neither ring nor overshoot."""
    shrinks = resized[0] <= mask.shape[1] and resized[1] <= mask.shape[0]
    return cut(mask, resized, box, "area" if shrinks else "bilinear")


def crop_box(
    resized: tuple[int, int], bucket: tuple[int, int], fraction: tuple[float, float] = (0.5, 0.5)
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the bucket in the resized picture.

    Args:
        fraction: where the crop lies in what sticks out, left to right and top to bottom; 0.5 is the middle.
    """
    left = round((resized[0] - bucket[0]) * fraction[0])
    top = round((resized[1] - bucket[1]) * fraction[1])
    return left, top, left + bucket[0], top + bucket[1]


def covering_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest (W, H) of the picture's aspect ratio that covers the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str | None) -> np.ndarray:
    """Resize uint8 (H, W) or (H, W, 3) to ``size`` (W, H).

    All but nearest widen their kernel to shrink, so none aliases.
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
        import cv2

        cv2.setNumThreads(0)  # pictures are read in parallel already, and its threads do not survive a fork
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(pixels).resize(size, filters[interpolation]))
