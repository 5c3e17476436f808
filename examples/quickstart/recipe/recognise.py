"""Recognise shape, colour and concept from pixels, without a model.

The pixels that differ from the image's border are the shape. Its outline is compared with each shape drawn by
``images``, its colour with the named ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from examples.quickstart.recipe.images import (
    COLORS,
    CONCEPT_LOWER,
    CONCEPT_UPPER,
    POSITIONS,
    SHAPES,
    draw_shape,
)

#: sum of the channels' differences from the background at which a pixel belongs to the shape
_THRESHOLD = 90
#: pixels that are too few to be a shape
_FEWEST = 20


@dataclass(frozen=True)
class Seen:
    """``None`` where nothing stands out from the background."""

    shape: str | None
    color: str | None
    position: str | None


def recognise(image: Image.Image) -> Seen:
    """The shape and colour of a drawn image."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    mask = foreground(pixels)
    if mask.sum() < _FEWEST:
        return Seen(None, None, None)
    color = np.median(pixels[mask], axis=0)
    # a pixel belongs to what it is nearer to, which leaves out the hole of a ring in a tint of its own
    mask = np.abs(pixels - color).sum(axis=-1) < np.abs(pixels - background(pixels)).sum(axis=-1)
    cut = mask[_extent(mask)]
    shape = max(SHAPES, key=lambda name: _overlap(cut, _outline(name)))
    return Seen(shape, nearest_color(color), _nearest_position(mask))


def is_concept(image: Image.Image) -> bool:
    """Whether the image shows a disc, yellow above and blue below."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    mask = foreground(pixels)
    if mask.sum() < _FEWEST:
        return False
    rows, columns = _extent(mask)
    cut, inside = mask[rows, columns], pixels[rows, columns]
    middle = cut.shape[0] // 2
    upper, lower = inside[:middle][cut[:middle]], inside[middle:][cut[middle:]]
    if min(len(upper), len(lower)) < _FEWEST // 2:
        return False
    colors = nearest_color(np.median(upper, axis=0)), nearest_color(np.median(lower, axis=0))
    return colors == (CONCEPT_UPPER, CONCEPT_LOWER) and _overlap(cut, _outline("circle")) > 0.75


def foreground(pixels: np.ndarray) -> np.ndarray:
    """bool (H, W): what differs from the border's median colour; ``pixels`` is (H, W, 3), 0 to 255."""
    return np.abs(pixels - background(pixels)).sum(axis=-1) > _THRESHOLD


def background(pixels: np.ndarray) -> np.ndarray:
    """The border's median colour, (3,), of (H, W, 3)."""
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])
    return np.median(border, axis=0)


def nearest_color(color: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.abs(np.array(COLORS[name]) - color).sum()))


def _nearest_position(mask: np.ndarray) -> str:
    ys, xs = np.where(mask)
    x, y = xs.mean() / mask.shape[1], ys.mean() / mask.shape[0]
    return min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (x, y)))


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the shape, without single pixels that stray."""
    ys, xs = np.where(mask)
    top, bottom = (round(float(v)) for v in np.percentile(ys, (1, 99)))
    left, right = (round(float(v)) for v in np.percentile(xs, (1, 99)))
    return slice(top, bottom + 1), slice(left, right + 1)


@cache
def _outline(shape: str) -> np.ndarray:
    """bool outline of a shape, cut to its extent."""
    drawn = Image.new("L", (256, 256), 0)
    draw_shape(ImageDraw.Draw(drawn), shape, 128, 128, 100, 255, 0)
    mask = np.asarray(drawn) > 128
    ys, xs = np.where(mask)
    return mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _overlap(mask: np.ndarray, outline: np.ndarray) -> float:
    """Intersection over union, the outline stretched to the mask's size."""
    stretched = Image.fromarray(outline).resize((mask.shape[1], mask.shape[0]), Image.Resampling.NEAREST)
    other = np.asarray(stretched)
    return float((mask & other).sum() / max(1, (mask | other).sum()))
