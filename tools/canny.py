"""Draw the edges of images, white on black, as conditions for a ControlNet (Canny's method).

    python tools/canny.py --input image.png --output edges.png
    python tools/canny.py --input images --output edges --thres1 100 --thres2 200

Of a folder every image is drawn, under its own name as .png. An edge begins where the brightness changes by more than
--thres2 and goes on while it changes by more than --thres1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--input", metavar="PATH", help="image, or folder of images")
    parser.add_argument("--output", metavar="PATH", help="image to write, or folder for them")
    parser.add_argument("--thres1", type=int, default=32, metavar="N", help="change along an edge, 0 to 255 (32)")
    parser.add_argument("--thres2", type=int, default=224, metavar="N", help="change where one begins (224)")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Draw the edges.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    for flag in ("input", "output"):
        if not getattr(args, flag):
            raise UserError(f"--{flag}: name the image, or a folder of images")
    for flag in ("thres1", "thres2"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 0")
    # only now, as --help needs none of it
    from library.data.image_io import opencv, read_image
    from library.data.image_saving import image_format, save_image
    from library.data.image_tree import list_images

    source, target = Path(args.input), Path(args.output)
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder")
    jobs = [(source, target)]
    if source.is_dir():
        jobs = [(image, target / f"{image.stem}.png") for image in list_images(source, recursive=False, flag="--input")]
        if len({out for _, out in jobs}) < len(jobs):
            raise UserError(f"--input {source}: two images have one name with different endings; rename one")
    else:
        image_format(target, "--output")
    if any(image.resolve() == out.resolve() for image, out in jobs):
        raise UserError(f"--output {target}: would replace its source; name another place")
    cv2 = opencv()
    problems: list[str] = []
    for image, out in jobs:
        try:
            grey = cv2.cvtColor(read_image(image), cv2.COLOR_RGB2GRAY)
        except UserError as error:
            problems.append(str(error))
            continue
        save_image(cv2.Canny(grey, args.thres1, args.thres2), out, "--output")
        print(f"{out}")
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    main(setup_parser().parse_args())
