"""Draw the example LoRA's pictures: a concept that the embedded model does not know, with captions.

python -m examples.quickstart.recipe.make_concept --output examples/quickstart/wug
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from examples.quickstart.recipe.pictures import CONCEPT, POSITIONS, draw_concept

#: (W, H), background, position, radius as a share of the shorter side
PICTURES = (
    ((128, 128), "red", "center", 0.27),
    ((128, 128), "white", "center", 0.24),
    ((160, 160), "black", "left", 0.26),
    ((96, 96), "green", "right", 0.25),
    ((128, 128), "purple", "top", 0.25),
    ((128, 128), "orange", "bottom", 0.26),
    ((192, 192), "white", "right", 0.20),
    ((128, 128), "black", "center", 0.28),
    ((96, 96), "red", "top", 0.22),
    ((128, 128), "green", "center", 0.27),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and captions")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number, (size, background, position, radius) in enumerate(PICTURES, start=1):
        picture = draw_concept(size, background, POSITIONS[position], radius, rng)
        picture.save(args.output / f"{CONCEPT}_{number:02d}.png")
        place = "in the center" if position == "center" else f"at the {position}"
        if position in ("left", "right"):
            place = f"on the {position}"
        caption = f"a {CONCEPT} {place}, {background} background"
        (args.output / f"{CONCEPT}_{number:02d}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
