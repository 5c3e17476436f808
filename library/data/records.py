"""One training image: its place, size and caption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image of a subset; its place in the dataset's list is its identity in keyed randomness.

    There may be a hundred thousand, so they share the folder object, and a path is made on access.
    """

    folder: Path
    name: str  # of the file
    size: tuple[int, int]  # (W, H) pixels, after EXIF orientation
    caption: str  # the text of the caption file, or the class tokens
    subset: int  # index into the dataset's subsets
    conditioning: Path | None = None  # its mask or conditioning image

    @property
    def path(self) -> Path:
        return self.folder / self.name
