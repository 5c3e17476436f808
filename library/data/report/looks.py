"""Look at every image once: whether it decodes, its hash and its appearance."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.image_io import read_image, read_orientation
from library.errors import UserError
from library.files.hashes import sha256_file

#: threads that read; Pillow, OpenCV and hashing release the interpreter's lock
THREADS = min(16, (os.cpu_count() or 1) + 1)

#: side in pixels of the coarse image that confirms similar images
COARSE = 16
#: bits of a fingerprint
BITS = 128


@dataclass(frozen=True)
class Look:
    """The appearance of an image, in less than a kilobyte."""

    path: Path
    digest: str  # sha256 of the file
    fingerprint: int  # of ``BITS`` bits
    coarse: np.ndarray  # uint8 (COARSE, COARSE, 3)
    turned: bool  # whether EXIF turns or mirrors it


def look_at(path: Path) -> Look:
    """Read and decode the whole file.

    Raises:
        UserError: the image cannot be read.
    """
    pixels = read_image(path)
    image = Image.fromarray(pixels)
    # a box filter in two steps: exact enough, and many times faster than one from a large image
    image.thumbnail((256, 256), Image.Resampling.BOX)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror}); remove or replace it") from None
    return Look(
        path=path,
        digest=digest,
        fingerprint=fingerprint(image),
        coarse=np.asarray(image.resize((COARSE, COARSE), Image.Resampling.BOX)),
        turned=read_orientation(path) != 1,
    )


def fingerprint(image: Image.Image) -> int:
    """Return 128 bits that hardly change when an image is resized, recompressed, or made a little brighter.

    The difference hash of N. Krawetz ("Kind of Like That", hackerfactor.com, 2013): whether brightness rises from one
    cell of a coarse grey image to the next, along 8 rows of 9 cells and, in addition, down 8 columns of 9.
    """
    grey = image.convert("L")
    along = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    bits = np.concatenate([(np.diff(along, axis=1) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def look_at_all(
    paths: Iterable[Path], report: Callable[[int, int], None] = lambda done, total: None
) -> tuple[dict[Path, Look], dict[Path, str]]:
    """Return the looks of readable images, and why the others cannot be read; in parallel.

    Args:
        report: called with images done and their total.
    """
    todo = list(dict.fromkeys(paths))
    looks: dict[Path, Look] = {}
    unreadable: dict[Path, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for done, (path, found) in enumerate(zip(todo, pool.map(_look_or_reason, todo), strict=True), start=1):
            if isinstance(found, Look):
                looks[path] = found
            else:
                unreadable[path] = found
            report(done, len(todo))
    return looks, unreadable


def _look_or_reason(path: Path) -> Look | str:
    try:
        return look_at(path)
    except UserError as error:
        return str(error)
