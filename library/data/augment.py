"""Augmentations that change at each use of an image: the crop and the colours.

All random numbers come from keyed generators. Sizes are (W, H) pixels, boxes (left, top, right, bottom).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.image_io import covering_size, crop_box, opencv

Size = tuple[int, int]
Box = tuple[int, int, int, int]

#: largest turn of the hue, degrees of the colour circle
HUE_SHIFT = 10.0
#: gamma is between 1 - this and 1 + this
GAMMA_SHIFT = 0.05


@dataclass(frozen=True)
class Placement:
    """The place of a bucket in an image: the image is resized, then cropped; masks are treated alike."""

    resized: Size
    box: Box  # in the resized image


def in_the_middle(size: Size, bucket: Size) -> Placement:
    """Return the middle of the image that just covers the bucket; caches hold this placement."""
    resized = covering_size(size, bucket)
    return Placement(resized, crop_box(resized, bucket))


def at_random(size: Size, bucket: Size, rng: random.Random) -> Placement:
    """Return a random place in the image that just covers the bucket."""
    resized = covering_size(size, bucket)
    return Placement(resized, crop_box(resized, bucket, (rng.random(), rng.random())))


@dataclass(frozen=True)
class Face:
    """A face in an image, pixels of the upright image."""

    center: tuple[int, int]  # (x, y)
    size: Size


def face_in_name(path: Path, size: Size) -> Face | None:
    """Read the face from a file name, as ``tools/detect_face_rotate.py`` writes it.

    That is ``<name>_<centre x>_<centre y>_<width>_<height>.<ending>``. ``None`` where the name has no such end, or
    where it cannot be a face in an image of this ``size``, such as in ``cat_2023_01_02_03.png``.
    """
    parts = path.stem.split("_")
    if len(parts) < 5 or not all(part.isascii() and part.isdigit() for part in parts[-4:]):
        return None
    x, y, width, height = (int(part) for part in parts[-4:])
    is_inside = x < size[0] and y < size[1] and 1 <= width <= size[0] and 1 <= height <= size[1]
    return Face((x, y), (width, height)) if is_inside else None


def around_face(
    size: Size, bucket: Size, face: Face, factors: tuple[float, float], rng: random.Random, *, moves: bool
) -> Placement:
    """Return a crop around the face, moved into the image where it would stick out.

    Args:
        factors: lowest and highest ratio of the crop's shorter side to the face's longer one; drawn evenly. A crop
            larger than the image becomes the whole image, and none is enlarged that a plain crop would not be.
        moves: whether the crop moves off the middle, with the face inside.
    """
    least = max(bucket[0] / size[0], bucket[1] / size[1])  # the image just covers the bucket
    scale = min(bucket) / (max(face.size) * rng.uniform(*factors))
    scale = min(max(scale, least), max(1.0, least))
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    corner = []
    for axis in range(2):
        start = face.center[axis] * scale - bucket[axis] / 2
        if moves:
            start += rng.uniform(-0.5, 0.5) * max(0.0, bucket[axis] - face.size[axis] * scale)
        corner.append(min(max(round(start), 0), resized[axis] - bucket[axis]))
    left, top = corner
    return Placement(resized, (left, top, left + bucket[0], top + bucket[1]))


def vary_colours(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Change hue and gamma of uint8 (H, W, 3) RGB a little, the same for the whole image."""
    return change_colours(
        pixels, hue=rng.uniform(-HUE_SHIFT, HUE_SHIFT), gamma=rng.uniform(1 - GAMMA_SHIFT, 1 + GAMMA_SHIFT)
    )


def change_colours(pixels: np.ndarray, *, hue: float, gamma: float) -> np.ndarray:
    """Return uint8 (H, W, 3) RGB with its hue turned by ``hue`` degrees and raised to the power of ``gamma``."""
    cv2 = opencv()
    # as float32 hue has no steps: 0..360 degrees, saturation and value 0..1
    hsv = cv2.cvtColor(pixels.astype(np.float32) / 255.0, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + hue) % 360.0
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).clip(0.0, 1.0) ** gamma
    return (rgb * 255.0).round().astype(np.uint8)
