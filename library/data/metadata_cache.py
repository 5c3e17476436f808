"""``metadata_cache.json``: sizes and captions of a folder's images, remembered between runs.

The published layout is one entry for each image, ``{path: {"caption": text, "resolution": [W, H]}}``. Entries written
here also have a stamp of their files, so that a changed file is read again; entries without a stamp, of the
predecessor, always are. Sizes are those of the image as it is seen, after EXIF orientation.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from library.errors import UserError
from library.files.atomic import write_text

logger = logging.getLogger(__name__)

NAME = "metadata_cache.json"

Size = tuple[int, int]

#: size of a file in bytes above which its folder has many images; an entry takes about 200
_MANY = 4_000_000


class Entry(TypedDict):
    """The entry of one image in the file."""

    caption: str  # the caption file's text, or the class tokens
    resolution: Size  # (W, H) pixels; read back as a list
    read_from: str  # stamp of the files, see ``image_folder``


class MetadataCache:
    """The remembered entries of one folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._prefix = f"{folder}{os.sep}"
        self._read = self._load()

    def _load(self) -> Mapping[str, Any]:
        """Return the file's table with paths in this folder; empty without a file, or with a damaged one."""
        try:
            with no_collection():
                found = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s: cannot be read (%s), and is made again", self._path, error)
            return {}
        if not isinstance(found, dict):
            logger.warning("%s: holds no table of images, and is made again", self._path)
            return {}
        if next(iter(found), self._prefix).startswith(self._prefix):
            return found
        # the folder was moved, or has another path
        return {self._prefix + path.replace("\\", "/").rpartition("/")[2]: entry for path, entry in found.items()}

    def look_up(self, name: str, read_from: str | None) -> Entry | None:
        """Return the entry of an image, if it has this stamp and is complete."""
        entry = self._read.get(self._prefix + name)
        if type(entry) is not dict or read_from is None or entry.get("read_from") != read_from:
            return None
        size = entry.get("resolution")
        if type(size) is not list or len(size) != 2 or type(entry.get("caption")) is not str:
            return None
        width, height = size
        is_good = type(width) is int and type(height) is int and width > 0 < height
        return entry if is_good else None  # type: ignore[return-value]

    def entry(self, name: str) -> Entry:
        """Return the entry that ``look_up`` found."""
        return self._read[self._prefix + name]

    def __len__(self) -> int:
        """Return the number of images with an entry, current or not."""
        return len(self._read)

    def write(self, entries: Mapping[str, Entry]) -> None:
        """Replace the file; a folder without write permission is left as it is, with a warning."""
        table = {self._prefix + name: entry for name, entry in entries.items()}
        try:
            write_text(self._path, json.dumps(table), by_many=True)
        except (UserError, OSError) as error:
            logger.warning("%s; sizes will be read again next time", error)


def remembers_many(folder: Path) -> bool:
    """Whether the folder has a file of some 20,000 images or more."""
    try:
        return (folder / NAME).stat().st_size >= _MANY
    except OSError:
        return False


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause garbage collection while hundreds of thousands of live objects are made, which it would scan repeatedly."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
