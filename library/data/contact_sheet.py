"""Lay out the samples of batches for people: as the model gets them, with masks, captions and facts."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.files.atomic import atomic_path, write_text
from library.plain_text import printable, visible

if TYPE_CHECKING:
    from library.data.batch import Batch

#: samples on a sheet; a batch is never split over two sheets, so there may be a few more
CELLS = 12
#: samples side by side
COLUMNS = 4
#: bounds of a shown image's longer side, pixels; none is enlarged
LEAST_SIDE, LARGEST_SIDE = 240, 384
#: lines of a caption; the whole of it is in LIST_NAME
CAPTION_LINES = 8

LIST_NAME = "images.jsonl"
_SHEET = re.compile(r"sheet_\d{4,}\.jpg")

_GAP, _TEXT, _LINE = 8, 13, 17  # pixels: between things, height of letters, distance of lines
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
#: behind the samples of one batch and of the next, to tell them apart
_SHADES = ((255, 255, 255), (228, 236, 246))


@dataclass(frozen=True)
class Shown:
    """One sample of a batch; numbers of epochs, steps, batches and places count from 1."""

    epoch: int
    step: int
    batch: int
    place: int  # in its batch
    path: str
    pixels: np.ndarray  # uint8 (H, W, 3), after all augmentation
    mask: np.ndarray | None  # uint8 (H, W), 255 where the loss counts in full
    conditioning: np.ndarray | None  # uint8 (H, W, 3)
    caption: str  # of this use
    bucket: tuple[int, int]  # (W, H)
    size: tuple[int, int]  # (W, H) of the upright image file
    corner: tuple[int, int]  # (left, top) of the crop in the resized, maybe mirrored image
    flipped: bool
    loss_weight: float

    def facts(self) -> dict[str, Any]:
        """Return everything but the pixels, as JSON values."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "place": self.place,
            "image_path": printable(self.path),
            "caption": self.caption,
            "bucket": list(self.bucket),
            "size": list(self.size),
            "crop_left_top": list(self.corner),
            "flipped": self.flipped,
            "loss_weight": self.loss_weight,
            "mean_mask": None if self.mask is None else round(float(self.mask.mean()) / 255, 4),
        }

    def lines(self) -> list[str]:
        """Return the lines above the caption."""
        weight = f"loss weight {self.loss_weight:g}"
        if self.mask is not None:
            weight += f", mask {self.mask.mean() / 255:.0%} on average"
        return [
            f"epoch {self.epoch}, step {self.step}, batch {self.batch}, image {self.place}",
            f"bucket {self.bucket[0]}x{self.bucket[1]}, file {self.size[0]}x{self.size[1]}",
            f"crop begins at {self.corner[0]},{self.corner[1]}" + (", mirrored" if self.flipped else ""),
            weight,
        ]

    @property
    def panels(self) -> list[np.ndarray]:
        """Return the image, and its mask and conditioning image."""
        found = [self.pixels, self.mask, self.conditioning]
        return [panel for panel in found if panel is not None]


def samples_of(batch: Batch, *, epoch: int, step: int, number: int) -> list[Shown]:
    """Return the samples of a batch that was made from images, not from cached latents.

    Args:
        epoch: from 1.
        step: of the run, from 1.
        number: of the batch in its epoch, from 1.
    """
    assert batch.images is not None
    found = []
    for index, path in enumerate(batch.paths):
        height, width = batch.original_sizes[index].tolist()
        top, left = batch.crop_top_lefts[index].tolist()
        masks, conditioning = batch.loss_masks, batch.conditioning_images
        found.append(
            Shown(
                epoch=epoch,
                step=step,
                batch=number,
                place=index + 1,
                path=path,
                pixels=_to_bytes(batch.images[index]),
                mask=None if masks is None else (masks[index] * 255).round().byte().numpy(),
                conditioning=None if conditioning is None else _to_bytes(conditioning[index]),
                caption=batch.captions[index],
                bucket=batch.bucket,
                size=(width, height),
                corner=(left, top),
                flipped=batch.flipped[index],
                loss_weight=float(batch.loss_weights[index]),
            )
        )
    return found


def _to_bytes(image: Tensor) -> np.ndarray:
    """float (3, H, W) in [-1, 1] -> uint8 (H, W, 3)."""
    return ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


# ---- drawing ----


def draw_sheet(samples: Sequence[Shown]) -> Image.Image:
    """Samples in rows, each with its mask and conditioning image beside it and its text below."""
    side = min(max(max(sample.bucket) for sample in samples), LARGEST_SIDE)
    panels = max(len(sample.panels) for sample in samples)
    width = max(panels * (side + _GAP) + _GAP, LEAST_SIDE)
    columns = min(max(1, COLUMNS // panels), len(samples))
    cells = [_draw_cell(sample, width, side) for sample in samples]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (columns * width, sum(heights)), _PAPER)
    for row_index, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * width, sum(heights[:row_index])))
    return sheet


def _draw_cell(sample: Shown, width: int, side: int) -> Image.Image:
    font = _font()
    text_width = width - 2 * _GAP
    name = wrapped(visible(Path(sample.path).name), font, text_width, 2)
    facts = [line for text in sample.lines() for line in wrapped(text, font, text_width, 2)]
    caption = wrapped(visible(sample.caption) or "(no caption)", font, text_width, CAPTION_LINES)
    images = [_shrunk(panel, side) for panel in sample.panels]
    top = max(image.height for image in images) + 2 * _GAP
    lines = [*((line, _INK) for line in name), *((line, _FAINT) for line in facts), *((line, _INK) for line in caption)]
    cell = Image.new("RGB", (width, top + len(lines) * _LINE + _GAP), _SHADES[sample.batch % len(_SHADES)])
    for index, image in enumerate(images):
        cell.paste(image, (_GAP + index * (side + _GAP), _GAP))
    draw = ImageDraw.Draw(cell)
    for index, (line, colour) in enumerate(lines):
        draw.text((_GAP, top + index * _LINE), line, fill=colour, font=font)
    return cell


def _shrunk(pixels: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((side, side))
    return image


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)  # comes with Pillow; Latin letters


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """Wrap text into at most ``most`` lines of ``width`` pixels, at spaces, or anywhere in longer words."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines[most - 1 :] = [lines[most - 1].rstrip() + " ..."]
    return lines


class SheetWriter:
    """Writes ``sheet_0001.jpg``, ... and a line of JSON for each sample into a folder, and removes earlier sheets
    there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: list[Shown] = []
        self._facts: list[str] = []
        self.sheets = 0
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _SHEET.fullmatch(path.name):
                path.unlink()  # otherwise sheets of an earlier, larger data set would remain

    def add(self, samples: Sequence[Shown]) -> None:
        """Add a whole batch."""
        self._waiting += samples
        self._facts += [json.dumps(sample.facts(), ensure_ascii=False) + "\n" for sample in samples]
        if len(self._waiting) >= CELLS:
            self._write_sheet()

    def close(self) -> None:
        if self._waiting:
            self._write_sheet()
        write_text(self._folder / LIST_NAME, "".join(self._facts))

    def _write_sheet(self) -> None:
        self.sheets += 1
        with atomic_path(self._folder / f"sheet_{self.sheets:04d}.jpg") as part:
            draw_sheet(self._waiting).save(part, format="JPEG", quality=92, subsampling=0)
        self._waiting = []
