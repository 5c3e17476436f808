"""Lay out the sample images of a run on one sheet: a row for each save, a column for each prompt.

    python tools/sample_sheet.py output/sample sheet.png
    python tools/sample_sheet.py output/sample sheet.png --at 0 250 500 1000 --size 384

The images are those of --sample_prompts. docs/looking_at_results.md explains what to look for.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from library.files.atomic import atomic_path

_NAME = re.compile(r"(?:.*_)?(?P<epoch>e?)(?P<number>\d{6})_(?P<prompt>\d+)_\d{14}(?:_\d+)?\.png")
GAP, LINE = 6, 20  # pixels between images, and of a line of text


@dataclass(frozen=True)
class Sample:
    """One sample image: the step or epoch after which it was generated, and the place of its prompt in the file."""

    path: Path
    number: int
    unit: str  # "step" or "epoch"
    prompt: int


def find_samples(folder: Path, at: Sequence[int] = ()) -> list[Sample]:
    """Return the sample images of a folder; of several with the same place the newest.

    Args:
        at: only those after these steps or epochs.

    Raises:
        UserError: there are none.
    """
    found: dict[tuple[str, int, int], Sample] = {}
    for path in sorted(folder.glob("*.png")):  # by time within one place
        if match := _NAME.fullmatch(path.name):
            sample = Sample(path, int(match["number"]), "epoch" if match["epoch"] else "step", int(match["prompt"]))
            if not at or sample.number in at:
                found[sample.unit, sample.number, sample.prompt] = sample
    if not found:
        which = f" after {', '.join(map(str, at))}" if at else ""
        raise UserError(f"{folder}: holds no sample images{which}; name the folder 'sample' in the run's --output_dir")
    return list(found.values())


def sheet(samples: Sequence[Sample], size: int) -> Image.Image:
    """Return the sheet, with images at most ``size`` pixels wide and high."""
    rows = sorted({(sample.unit, sample.number) for sample in samples})
    columns = sorted({sample.prompt for sample in samples})
    left, top = 90, LINE + GAP
    result = Image.new("RGB", (left + len(columns) * (size + GAP), top + len(rows) * (size + GAP)), "white")
    write, font = ImageDraw.Draw(result), ImageFont.load_default(size=14)
    for unit, number in rows:
        write.text((GAP, top + rows.index((unit, number)) * (size + GAP)), f"{unit} {number}", fill="black", font=font)
    for sample in samples:
        x = left + columns.index(sample.prompt) * (size + GAP)
        y = top + rows.index((sample.unit, sample.number)) * (size + GAP)
        with Image.open(sample.path) as image:
            prompt = str(image.info.get("prompt", ""))
            scale = size / max(image.size)
            fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            result.paste(image.convert("RGB").resize(fitted, resample), (x, y))
        if (sample.unit, sample.number) == rows[0]:
            write.text((x, GAP // 2), _cut(prompt, write, font, size), fill="black", font=font)
    return result


def _cut(text: str, write: ImageDraw.ImageDraw, font: ImageFont.ImageFont, width: int) -> str:
    """Return as much of a text as fits into a width in pixels."""
    while text and write.textlength(text, font=font) > width:
        text = text[:-1]
    return text


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of sample images, such as output/sample")
    parser.add_argument("output", type=Path, help="image file to write, .png or .jpg")
    parser.add_argument("--at", type=int, nargs="+", default=(), help="only these steps or epochs (all, if not given)")
    parser.add_argument("--size", type=int, default=256, help="longer side of each image on the sheet, pixels")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    made = sheet(find_samples(args.folder, args.at), args.size)
    with atomic_path(args.output) as path:
        made.save(path, format="JPEG" if args.output.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    print(f"sheet: {args.output.resolve()}")


if __name__ == "__main__":
    main(setup_parser().parse_args())
