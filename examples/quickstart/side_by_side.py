"""One image of two folders of drawings: a pair for each prompt, left without the LoRA, right with it.

python examples/quickstart/side_by_side.py BEFORE AFTER prompts.txt before_after.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.files.atomic import atomic_path
from library.inference.prompt_file import read_prompt_file

CELL = 192  # pixels of a drawing in the image; drawings are enlarged to it
GAP = 6  # between the drawings of a pair
MARGIN = 20
LINE = 22  # of text
COLUMNS = 3  # pairs beside each other, so that six prompts fit on a screen


def side_by_side(before: list[Path], after: list[Path], prompts: list[str]) -> Image.Image:
    """A pair for each prompt, with the prompt below it.

    Raises:
        ValueError: the folders do not hold one drawing for each prompt.
    """
    if not len(before) == len(after) == len(prompts) > 0:
        raise ValueError(f"{len(prompts)} prompts, {len(before)} drawings before and {len(after)} after")
    columns, rows = min(COLUMNS, len(prompts)), -(-len(prompts) // COLUMNS)
    width, height = 2 * CELL + GAP + MARGIN, CELL + 2 * LINE + MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height), "white")
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for index, prompt in enumerate(prompts):
        left, top = MARGIN + index % COLUMNS * width, MARGIN + index // COLUMNS * height
        for path, title, x in ((before, "without the LoRA", left), (after, "with the LoRA", left + CELL + GAP)):
            write.text((x, top), title, fill="gray", font=font)
            with Image.open(path[index]) as drawing:
                sheet.paste(drawing.resize((CELL, CELL), Image.Resampling.NEAREST), (x, top + LINE))
        write.text((left, top + LINE + CELL + 2), prompt, fill="black", font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of drawings without the LoRA")
    parser.add_argument("after", type=Path, help="folder of drawings with it")
    parser.add_argument("prompts", type=Path, help="the prompt file both were drawn from")
    parser.add_argument("output", type=Path, help="the image to write")
    args = parser.parse_args()
    prompts = [prompt.prompt for prompt in read_prompt_file(args.prompts)]
    sheet = side_by_side(sorted(args.before.glob("*.png")), sorted(args.after.glob("*.png")), prompts)
    with atomic_path(args.output) as path:
        sheet.save(path, format="PNG")
    print(f"before and after: {args.output.resolve()}")


if __name__ == "__main__":
    main()
