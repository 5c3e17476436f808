"""Grids: one image for each combination of values, on one labelled sheet.

An axis is ``name=value,value,...``, such as ``scale=3,5,7``. ``file``, without values, makes one image for each file of
``--network_weights``, with the other files off. This module does not import torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.diffusion.samplers import SAMPLER_NAMES
from library.errors import UserError, did_you_mean
from library.inference.plan import PlannedImage

if TYPE_CHECKING:
    from PIL.Image import Image

#: pixels between images, and around labels
_GAP = 8
#: the largest number of images on one sheet
MAX_IMAGES = 400

FILE, MULTIPLIER, STRENGTH = "file", "multiplier", "strength"


def _sampler(text: str) -> str:
    if text not in SAMPLER_NAMES:
        raise ValueError(f"no such sampler{did_you_mean(text, SAMPLER_NAMES)}")
    return text


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f'"{text}" is not a number')
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'"{text}" is not a whole number') from None


#: axis -> parser of a value; all but ``multiplier`` are fields of ``ImageSettings``
_AXES: dict[str, Callable[[str], Any]] = {
    "seed": _whole,
    "scale": _number,
    "negative_scale": _number,
    "steps": _whole,
    "sampler": _sampler,
    STRENGTH: _number,
    MULTIPLIER: _number,
}


@dataclass(frozen=True)
class Axis:
    """One direction of the sheet."""

    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


def read_axes(texts: Sequence[str], files: Sequence[Path], *, started: bool) -> list[Axis]:
    """Parse the axes; the first gives the columns, the others the rows.

    Args:
        files: of ``--network_weights``.
        started: whether images start from other images, so that there is a strength.

    Raises:
        UserError: unknown names, bad values, too many images.
    """
    axes = []
    for text in texts:
        name, _, values = text.partition("=")
        if name == FILE:
            if len(files) < 2:
                raise UserError("--grid file: give several files with --network_weights, which are compared")
            axes.append(Axis(name, tuple(range(len(files))), tuple(path.stem for path in files)))
            continue
        if name not in _AXES:
            raise UserError(f'--grid {text}: no axis "{name}"{did_you_mean(name, (*_AXES, FILE))}; there are '
                            f"{', '.join((*_AXES, FILE))}")  # fmt: skip
        given = [value.strip() for value in values.split(",") if value.strip()]
        try:
            read = tuple(_AXES[name](value) for value in given)
        except ValueError as error:
            raise UserError(f"--grid {text}: {error}") from None
        if not read:
            raise UserError(f"--grid {text}: give values, such as {name}=1,2,3")
        if name == MULTIPLIER and not files:
            raise UserError("--grid multiplier: there is no network; give --network_weights")
        if name == STRENGTH and not started:
            raise UserError(
                "--grid strength: there is no image to start from; give --image_path or --highres_fix_scale"
            )
        axes.append(Axis(name, read, tuple(f"{name} {value}" for value in given)))
    names = [axis.name for axis in axes]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--grid: {doubled} is given twice")
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_IMAGES:
        raise UserError(f"--grid: {count} images on one sheet; give at most {MAX_IMAGES}")
    return axes


def combinations(image: PlannedImage, axes: Sequence[Axis], multipliers: Sequence[float]) -> list[PlannedImage]:
    """Return the settings of an image for each combination, row by row.

    Args:
        multipliers: of the networks, if the image sets none.
    """
    found = []
    for values in itertools.product(*(axis.values for axis in reversed(axes))):
        chosen = dict(zip((axis.name for axis in reversed(axes)), values, strict=True))
        strengths = list(image.multipliers) + list(multipliers[len(image.multipliers) :])
        if MULTIPLIER in chosen:
            strengths = [chosen.pop(MULTIPLIER)] * len(strengths)
        if FILE in chosen:
            place = chosen.pop(FILE)
            strengths = [strength if n == place else 0.0 for n, strength in enumerate(strengths)]
        settings = replace(image.settings, **chosen)
        found.append(replace(image, settings=settings, multipliers=tuple(strengths), file_name=None))
    return found


def draw_sheet(images: Sequence[Image], axes: Sequence[Axis]) -> Image:
    """Lay out images, row by row, on one sheet with the labels of their columns and rows."""
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    columns = axes[0].labels
    rows = [", ".join(reversed(labels)) for labels in itertools.product(*(axis.labels for axis in reversed(axes[1:])))]
    font = ImageFont.load_default(max(12, images[0].width // 24))
    measure = ImageDraw.Draw(PIL.Image.new("RGB", (1, 1)))
    width = max((int(measure.textlength(row, font)) for row in rows), default=0)
    left = width + 2 * _GAP if width else _GAP
    top = int(font.size) + 2 * _GAP
    cell = max(image.width for image in images), max(image.height for image in images)
    size = left + len(columns) * (cell[0] + _GAP), top + len(rows) * (cell[1] + _GAP)
    sheet = PIL.Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, image in enumerate(images):
        row, column = divmod(place, len(columns))
        sheet.paste(image, (left + column * (cell[0] + _GAP), top + row * (cell[1] + _GAP)))
    for column, label in enumerate(columns):
        draw.text((left + column * (cell[0] + _GAP), _GAP), label, "black", font)
    for row, label in enumerate(rows):
        draw.text((_GAP, top + row * (cell[1] + _GAP)), label, "black", font)
    return sheet
