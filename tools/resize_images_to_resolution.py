"""Write copies of images in smaller resolutions, to train with images of several sizes.

    python tools/resize_images_to_resolution.py images resized --max_resolution 768x768,512x512 --copy_associated_files

An image whose area is larger than a resolution's is resized to that area and cut in the middle to sides that
--divisible_by divides; smaller ones keep their size. Files are named <name>+<resolution>.jpg; other files are copied.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

logger = logging.getLogger(__name__)

Size = tuple[int, int]


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("src_img_folder", help="folder of the images; folders in it are not searched")
    add("dst_img_folder", help="folder to write to")
    add(
        "--max_resolution",
        default="512x512,384x384,256x256,128x128",
        metavar="LIST",
        help="resolutions, such as 512x512,384x384; each image is written in all of them",
    )
    add("--divisible_by", type=int, default=1, metavar="N", help="sides are multiples of this many pixels (1)")
    add(
        "--interpolation",
        choices=["area", "cubic", "lanczos4", "nearest", "linear", "box"],
        help="how to resize (default: area to shrink)",
    )
    add("--save_as_png", action="store_true", help="write .png instead of .jpg of quality 100")
    add(
        "--copy_associated_files",
        action="store_true",
        help="copy files of an image's name, such as captions, for each resolution",
    )
    return parser


def resolutions(text: str) -> list[Size]:
    """Return the (W, H) of a list such as "512x512,384x384".

    Raises:
        UserError: something else.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part)
        if match is None or min(int(match[1]), int(match[2])) < 1:
            raise UserError(f'--max_resolution {text}: "{part}" is no resolution; write them as 512x512,384x384')
        found.append((int(match[1]), int(match[2])))
    return found


def resized_to(size: Size, resolution: Size) -> Size:
    """Return (W, H) of the same ratio with at most the resolution's area; nothing is enlarged."""
    area, most = size[0] * size[1], resolution[0] * resolution[1]
    if area <= most:
        return size
    scale = math.sqrt(most / area)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def middle(size: Size, step: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the middle whose sides are multiples of ``step``."""
    width, height = (side // step * step or side for side in size)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write all copies.

    Raises:
        SystemExit: with code 2, after clear lines; of images that cannot be read after all others are written.
    """
    setup_console(ConsoleOptions())
    sizes = resolutions(args.max_resolution)
    if args.divisible_by < 1:
        raise UserError(f"--divisible_by {args.divisible_by}: must be at least 1")
    source, target = Path(args.src_img_folder), Path(args.dst_img_folder)
    # only now, as --help needs none of it
    from library.data.image_tree import list_images
    from library.files.atomic import make_folder

    images = list_images(source, recursive=False, flag="src_img_folder")
    if source.resolve() == target.resolve():
        raise UserError(f"dst_img_folder {target}: is the folder of the images; name another one")
    stems = Counter(image.stem for image in images)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(f"{source}: several images are named {twice[0]}, with different endings; rename all but one")
    make_folder(target)
    others = [path for path in sorted(source.iterdir()) if path.is_file() and path not in set(images)]
    for path in others:
        shutil.copy(path, target / path.name)
    ending = ".png" if args.save_as_png else ".jpg"
    problems = []
    for image in images:
        try:
            _write_copies(image, target, sizes, ending, args)
        except UserError as error:
            problems.append(str(error))
            continue
        for path in others if args.copy_associated_files else ():
            if path.stem == image.stem:
                for width, height in sizes:
                    shutil.copy(path, target / f"{path.stem}+{width}x{height}{path.suffix}")
    logger.info("%s: %d images in %d resolutions", target, len(images) - len(problems), len(sizes))
    if problems:
        raise UserError("\n".join(problems))


def _write_copies(image: Path, target: Path, sizes: list[Size], ending: str, args: argparse.Namespace) -> None:
    from library.data.image_io import read_image, resize
    from library.data.image_saving import save_image

    pixels = read_image(image)  # (H, W, 3)
    method = {"lanczos4": "lanczos"}.get(args.interpolation, args.interpolation)
    for resolution in sizes:
        own = (pixels.shape[1], pixels.shape[0])
        size = resized_to(own, resolution)
        resized = pixels if size == own else resize(pixels, size, method)
        left, top, right, bottom = middle(size, args.divisible_by)
        path = target / f"{image.stem}+{resolution[0]}x{resolution[1]}{ending}"
        quality = None if args.save_as_png else 100
        save_image(resized[top:bottom, left:right], path, quality=quality)


if __name__ == "__main__":
    main(setup_parser().parse_args())
