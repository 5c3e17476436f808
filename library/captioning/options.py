"""Options that the scripts of ``finetune/`` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train_data_dir", metavar="FOLDER", help="folder of the images")
    parser.add_argument("--recursive", action="store_true", help="its folders too")


def add_ending(parser: argparse.ArgumentParser, default: str, *, misspelt: bool) -> None:
    """Add the ending of caption files, with the published flag that is misspelt."""
    if misspelt:
        parser.add_argument(
            "--caption_extention", metavar="ENDING", help="the same as --caption_extension, of old command lines"
        )
    parser.add_argument(
        "--caption_extension", default=default, metavar="ENDING", help=f"ending of caption files ({default})"
    )


def ending_of(args: argparse.Namespace) -> str:
    """Return the ending of caption files, with its dot.

    Raises:
        UserError: none, or one with a folder in it.
    """
    ending = getattr(args, "caption_extention", None) or args.caption_extension
    if not ending.strip(". ") or "/" in ending or "\\" in ending:
        raise UserError(f"--caption_extension {ending}: must be an ending such as .txt")
    return ending if ending.startswith(".") else f".{ending}"


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add how a script goes through the images with a model."""
    add = parser.add_argument
    add("--batch_size", type=int, default=1, metavar="N", help="images described at a time (1)")
    add("--max_data_loader_n_workers", type=int, metavar="N", help="threads that read images ahead (2); 0: none")
    add("--debug", action="store_true", help="print each image with its text")
    add("--overwrite", action="store_true", help="write captions that exist anew; without, they are kept")
    add("--on_bad_image", choices=["skip", "stop"], default="skip", help="unreadable images: skip them, or stop (skip)")
    add("--dry_run", action="store_true", help="say what would be done; no model is loaded and nothing written")
    add("--device", metavar="DEVICE", help="where to compute (cuda if there is one, else cpu)")


@dataclass(frozen=True)
class Work:
    """The values of ``add_work``."""

    batch_size: int
    readers: int
    debug: bool
    overwrite: bool
    stop_on_bad_image: bool
    dry_run: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Work:
        """Raises UserError for numbers out of range."""
        readers = 2 if args.max_data_loader_n_workers is None else args.max_data_loader_n_workers
        if args.batch_size < 1:
            raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
        if readers < 0:
            raise UserError(f"--max_data_loader_n_workers {readers}: must be at least 0")
        return cls(args.batch_size, readers, args.debug, args.overwrite, args.on_bad_image == "stop", args.dry_run)


def images_of(args: argparse.Namespace) -> Sequence[Path]:
    """Return the images of ``add_folder``, in order.

    Raises:
        UserError: no such folder, or none in it.
    """
    # only now, for ``--help``
    from library.data.image_tree import list_images

    return list_images(Path(args.train_data_dir), recursive=args.recursive, flag="train_data_dir")


def check_top_p(args: argparse.Namespace) -> None:
    """Raise UserError for a share of the probability that is none."""
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: must be more than 0 and at most 1")


def add_metadata_files(parser: argparse.ArgumentParser) -> None:
    """Add what scripts that merge into metadata share."""
    add = parser.add_argument
    add("out_json", metavar="FILE", help="metadata file to write")
    add("--in_json", metavar="FILE", help="metadata file to begin with (default: the one to write, if it exists)")
    add("--full_path", action="store_true", help="name images by their paths; without, by their names alone")
    add("--debug", action="store_true", help="print each image with its text")
    add("--dry_run", action="store_true", help="say what would be done and write nothing")
