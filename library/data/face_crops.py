"""Turn images so that a face is upright, and cut them around it. All sizes are pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from library.data.image_io import opencv, resize

Size = tuple[int, int]


@dataclass(frozen=True)
class Face:
    """The place of a face: centre, width, height, and its lean in degrees clockwise."""

    x: float
    y: float
    width: float
    height: float
    angle: float = 0.0

    @property
    def side(self) -> float:
        """Return the longer side."""
        return max(self.width, self.height)


@dataclass(frozen=True)
class Crop:
    """The region to cut out around a face.

    ``size`` is (W, H) of the result, or ``ratio`` gives it as multiples of the face's side; ``None`` for both: the
    whole image. ``face_side``: the face becomes this large. ``fit``: the image becomes as small as the crop allows.
    """

    size: Size | None = None
    ratio: tuple[float, float] | None = None
    face_side: int | None = None
    fit: bool = False


def upright(pixels: np.ndarray, face: Face) -> np.ndarray:
    """Rotate uint8 (H, W, 3) about the face so that its eyes are level; the border is mirrored."""
    cv2 = opencv()
    turn = cv2.getRotationMatrix2D((face.x, face.y), face.angle, 1.0)
    size = (pixels.shape[1], pixels.shape[0])
    return cv2.warpAffine(pixels, turn, size, flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT)


def angle_of(right_eye: tuple[float, float], left_eye: tuple[float, float]) -> float:
    """Return the angle in degrees of the line from the right eye (at the left of an image) to the left one."""
    return math.degrees(math.atan2(left_eye[1] - right_eye[1], left_eye[0] - right_eye[0]))


def crop_size(crop: Crop, face: Face) -> Size | None:
    """Return (W, H) of the crop."""
    if crop.ratio is not None:
        return int(face.side * crop.ratio[0] + 0.5), int(face.side * crop.ratio[1] + 0.5)
    return crop.size


def scale_for(size: Size, crop: Size, face: Face, *, face_side: int | None, fit: bool) -> float:
    """Return by how much an image of ``size`` is resized before it is cut to ``crop``, which it then covers."""
    least = max(crop[0] / size[0], crop[1] / size[1])
    if face_side is not None:
        return max(face_side / face.side, least)
    return least if fit else max(1.0, least)


def cut_out(pixels: np.ndarray, face: Face, crop: Crop) -> tuple[np.ndarray, Face]:
    """Resize and cut uint8 (H, W, 3) around a face, within the image; return it and where the face is in it."""
    window = crop_size(crop, face)
    if window is None:
        return pixels, face
    size = (pixels.shape[1], pixels.shape[0])
    scale = scale_for(size, window, face, face_side=crop.face_side, fit=crop.fit)
    resized = (max(window[0], round(size[0] * scale)), max(window[1], round(size[1] * scale)))
    if resized != size:
        pixels = resize(pixels, resized, None)
    x, y = face.x * resized[0] / size[0], face.y * resized[1] / size[1]
    left, top = _start(x, window[0], resized[0]), _start(y, window[1], resized[1])
    cut = np.ascontiguousarray(pixels[top : top + window[1], left : left + window[0]])
    return cut, Face(x - left, y - top, face.width * scale, face.height * scale)


def _start(centre: float, length: int, whole: int) -> int:
    """Return where a window around ``centre`` begins, moved into the image."""
    return min(max(0, round(centre - length / 2)), whole - length)


def name_of(stem: str, face: Face, number: int | None) -> str:
    """Return the file name, without ending, that tells where the face is, as --face_crop_aug_range reads it."""
    counted = "" if number is None else f"_{number:02d}"
    place = "_".join(f"{round(value):04d}" for value in (face.x, face.y, face.width, face.height))
    return f"{stem}{counted}_{place}"
