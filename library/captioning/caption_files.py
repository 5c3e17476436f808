"""Captions beside their images: which images have one, and writing them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from library.data.discover import read_caption
from library.files.atomic import write_text

logger = logging.getLogger(__name__)

Size = tuple[int, int]


class Target(Protocol):
    """The place where texts of images are written."""

    def kept(self, image: Path) -> bool:
        """Whether the image has a text that stays."""
        ...

    def put(self, image: Path, text: str, size: Size) -> None:
        """Take an image's text, and its size (W, H)."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


def caption_path(image: Path, ending: str) -> Path:
    return image.with_name(image.stem + ending)


class CaptionFiles:
    """One text file for each image.

    Args:
        overwrite: write texts anew that exist.
    """

    def __init__(self, ending: str, *, overwrite: bool) -> None:
        self._ending = ending
        self._overwrite = overwrite

    def kept(self, image: Path) -> bool:
        return not self._overwrite and caption_path(image, self._ending).exists()

    def put(self, image: Path, text: str, size: Size) -> None:
        write_text(caption_path(image, self._ending), f"{text}\n")

    def read(self, image: Path) -> str | None:
        """Return an image's text. Raises UserError: it is not UTF-8."""
        path = caption_path(image, self._ending)
        return read_caption(path) if path.exists() else None

    def close(self) -> None:
        """Do nothing: ``put`` has written everything."""


def without_twins(images: Iterable[Path], ending: str) -> Sequence[Path]:
    """Leave out images whose caption file is that of another one, with a warning: a.jpg beside a.png."""
    first: dict[Path, Path] = {}
    for image in images:
        path = caption_path(image, ending)
        if path in first:
            logger.warning("%s and %s share %s, which tells of the first", first[path], image.name, path.name)
        else:
            first[path] = image
    return list(first.values())
