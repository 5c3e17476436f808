"""Find faces in images, turn the images so that a face is upright, and cut them around it.

    python tools/detect_face_rotate.py --src_dir images --dst_dir faces --rotate --crop_ratio 2,3
    python tools/detect_face_rotate.py --src_dir images --dst_dir faces --crop_size 512,768 --resize_face_size 224 \\
        --multiple_faces --face_model face_detection_yunet_2023mar.onnx

Faces are found by OpenCV's own detector. Its network, YuNet, is a file of 230 KB: --face_model names it; without, it
comes from the Hub or its cache. The names of the written images tell where the face is, as --face_crop_aug_range of
training reads them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    from library.data.face_crops import Crop, Face

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--src_dir", metavar="FOLDER", help="folder of the images")
    add("--dst_dir", metavar="FOLDER", help="folder to write to")
    add("--rotate", action="store_true", help="turn the image so that the eyes are level")
    add("--resize_fit", action="store_true", help="make images as small as the crop allows")
    add("--resize_face_size", type=int, metavar="N", help="resize so that the face has this size, pixels")
    add("--crop_size", metavar="W,H", help="size of the crop, pixels")
    add("--crop_ratio", metavar="X,Y", help="size of the crop, as multiples of the face's longer side")
    add("--min_size", type=int, metavar="N", help="leave out smaller faces, pixels")
    add("--max_size", type=int, metavar="N", help="leave out faces of this size and larger ones, pixels")
    add("--multiple_faces", action="store_true", help="write every face; without, the largest of each image")
    add("--debug", action="store_true", help="draw the face's box into the image")
    add("--face_model", metavar="FILE", help="the detector's network, an .onnx file (default: from the Hub)")
    add("--score", type=float, default=0.9, metavar="X", help="least score of a face, 0 to 1 (0.9)")
    return parser


def numbers(flag: str, text: str | None, kind: type) -> tuple[float, float] | None:
    """Return the two numbers of an option such as "512,768".

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    try:
        first, second = (kind(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text}: write two numbers, such as 512,768") from None
    if not (first > 0 and second > 0):
        raise UserError(f"{flag} {text}: both must be more than 0")
    return first, second


def crop_of(args: argparse.Namespace) -> Crop:
    """Return how to cut. Raises UserError for options that exclude each other."""
    from library.data.face_crops import Crop

    for one, other in (("resize_fit", "resize_face_size"), ("crop_ratio", "resize_face_size"),
                       ("crop_ratio", "crop_size")):  # fmt: skip
        if getattr(args, one) and getattr(args, other):
            raise UserError(f"--{one} and --{other} exclude each other: give one of them")
    size, ratio = numbers("--crop_size", args.crop_size, int), numbers("--crop_ratio", args.crop_ratio, float)
    if (args.resize_fit or args.resize_face_size) and not size and not ratio:
        raise UserError("--resize_fit and --resize_face_size need --crop_size: images are resized before a crop")
    for flag in ("resize_face_size", "min_size", "max_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    whole = None if size is None else (int(size[0]), int(size[1]))
    return Crop(whole, ratio, args.resize_face_size, args.resize_fit)


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Write all faces.

    Raises:
        SystemExit: with code 2, after clear lines; of images that cannot be read after all others are written.
    """
    setup_console(ConsoleOptions())
    for flag in ("src_dir", "dst_dir"):
        if not getattr(args, flag):
            raise UserError(f"--{flag}: name the folder")
    source, target = Path(args.src_dir), Path(args.dst_dir)
    if source.resolve() == target.resolve():
        raise UserError(f"--dst_dir {target}: is the folder of the images; name another one")
    crop = crop_of(args)
    # only now, as --help needs none of it
    from library.data.face_detector import FaceDetector
    from library.data.image_tree import list_images

    images = list_images(source, recursive=False, flag="--src_dir")
    detect = FaceDetector(_model(args.face_model), score=args.score)
    written, without, problems = 0, [], []
    for image in images:
        try:
            count = _faces_of(image, target, detect, crop, args)
        except UserError as error:
            problems.append(str(error))
            continue
        written += count
        if not count:
            without.append(image.name)
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        logger.warning("no face in %s%s", ", ".join(without[:3]), more)
    logger.info("%s: %d faces of %d images", target, written, len(images))
    if problems:
        raise UserError("\n".join(problems))


def _model(given: str | None) -> Path:
    from library.architectures.common.diffusers_folder import hub_file
    from library.data.face_detector import FILE, REPOSITORY

    if given is None:
        return hub_file(REPOSITORY, FILE, flag="--face_model")
    if not Path(given).is_file():
        raise UserError(f"--face_model {given}: no such file")
    return Path(given)


def _faces_of(image: Path, target: Path, detect, crop: Crop, args: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    """Write the faces of one image and return how many there are."""
    from library.data.face_crops import cut_out, name_of, upright
    from library.data.image_io import read_image
    from library.data.image_saving import save_image

    pixels = read_image(image)  # (H, W, 3)
    faces: list[Face] = [
        face
        for face in detect(pixels)
        if (args.min_size is None or face.side >= args.min_size)
        and (args.max_size is None or face.side < args.max_size)
    ]
    for number, face in enumerate(faces if args.multiple_faces else faces[:1]):
        turned = upright(pixels, face) if args.rotate else pixels
        result, place = cut_out(turned, face, crop)
        if args.debug:
            result = _with_box(result, place)
        name = name_of(image.stem, place, number if args.multiple_faces else None)
        save_image(result, target / f"{name}.png")
    return len(faces) if args.multiple_faces else min(1, len(faces))


def _with_box(pixels, face: Face):  # type: ignore[no-untyped-def]
    from library.data.image_io import opencv

    corners = [(round(face.x + sign * face.width / 2), round(face.y + sign * face.height / 2)) for sign in (-1, 1)]
    return opencv().rectangle(pixels.copy(), *corners, (255, 0, 255), 2)


if __name__ == "__main__":
    main(setup_parser().parse_args())
