"""Draw the example LoRA's images, with captions: a concept that the embedded model does not know (``wug``), and
scenes that it knows, for regularisation (``known``).

python -m examples.quickstart.recipe.make_concept --output examples/quickstart
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from examples.quickstart.recipe.images import CONCEPT, POSITIONS, draw_concept, draw_scene, random_scene

#: (W, H), background, position, radius as a share of the shorter side
IMAGES = (
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


#: scenes for regularisation
KNOWN = 48


def write(folder: Path, name: str, image: Image.Image, caption: str) -> None:
    image.save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two folders of images")
    args = parser.parse_args()
    concept, known = args.output / CONCEPT, args.output / "known"
    for folder in (concept, known):
        folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number, (size, background, position, radius) in enumerate(IMAGES, start=1):
        image = draw_concept(size, background, POSITIONS[position], radius, rng)
        place = "in the center" if position == "center" else f"at the {position}"
        if position in ("left", "right"):
            place = f"on the {position}"
        write(concept, f"{CONCEPT}_{number:02d}", image, f"a {CONCEPT} {place}, {background} background")
    rng = random.Random(1)
    for number in range(1, KNOWN + 1):
        scene = random_scene(rng)
        write(known, f"known_{number:02d}", draw_scene(scene, rng), scene.full_caption())


if __name__ == "__main__":
    main()
