"""One picture of two folders of drawings: each row a prompt, left without the LoRA, right with it.

python examples/quickstart/side_by_side.py BEFORE AFTER prompts.txt before_after.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.files.atomic import atomic_path
from library.inference.prompt_line import read_prompt_file

CELL = 192  # pixels of a drawing in the picture; drawings are enlarged to it
MARGIN = 12
TEXT = 20


def side_by_side(before: list[Path], after: list[Path], prompts: list[str]) -> Image.Image:
    """Rows of a prompt's two drawings.

    Raises:
        ValueError: the folders do not hold one drawing for each prompt.
    """
    if not len(before) == len(after) == len(prompts) > 0:
        raise ValueError(f"{len(prompts)} prompts, {len(before)} drawings before and {len(after)} after")
    row = CELL + TEXT + MARGIN
    sheet = Image.new("RGB", (2 * CELL + 3 * MARGIN, TEXT + MARGIN + row * len(prompts)), "white")
    write = ImageDraw.Draw(sheet)
    write.text((MARGIN, MARGIN), "without the LoRA", fill="black")
    write.text((2 * MARGIN + CELL, MARGIN), "with the LoRA", fill="black")
    for index, prompt in enumerate(prompts):
        top = TEXT + MARGIN + index * row
        for column, path in enumerate((before[index], after[index])):
            with Image.open(path) as drawing:
                drawing.thumbnail((CELL, CELL))
                factor = CELL / max(drawing.size)
                enlarged = drawing.resize(
                    (round(drawing.width * factor), round(drawing.height * factor)), Image.NEAREST
                )
            sheet.paste(enlarged, (MARGIN + column * (CELL + MARGIN), top))
        write.text((MARGIN, top + CELL + 2), prompt, fill="black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of drawings without the LoRA")
    parser.add_argument("after", type=Path, help="folder of drawings with it")
    parser.add_argument("prompts", type=Path, help="the prompt file both were drawn from")
    parser.add_argument("output", type=Path, help="the picture to write")
    args = parser.parse_args()
    prompts = [prompt.prompt for prompt in read_prompt_file(args.prompts)]
    sheet = side_by_side(sorted(args.before.glob("*.png")), sorted(args.after.glob("*.png")), prompts)
    with atomic_path(args.output) as path:
        sheet.save(path, format="PNG")
    print(f"before and after: {args.output.resolve()}")


if __name__ == "__main__":
    main()
