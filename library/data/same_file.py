"""Recognize one file or folder under several paths: links, ``..`` and relative paths."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from library.data.records import ImageRecord

_FOLDER = operator.attrgetter("folder")


def same_file(path: Path) -> Hashable:
    """Return a value that is the same for all paths to a file or folder."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    # some network drives have no file numbers
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def with_one_spelling(found: Sequence[list[ImageRecord]]) -> list[list[ImageRecord]]:
    """Return the records of several datasets with one path for each folder, the first of several.

    Caches are files beside images. With two paths, an image's file would be written twice at once, and one writer would
    lose what the other added.
    """
    # compared as objects first, because all records of a folder share one
    if len({one for records in found for one in set(map(id, map(_FOLDER, records)))}) < 2:
        return list(found)
    first: dict[Hashable, Path] = {}
    folders = {id(record.folder): record.folder for records in found for record in records}
    spelt = {folder: first.setdefault(same_file(folder), folder) for folder in folders.values()}
    if all(folder == kept for folder, kept in spelt.items()):
        return list(found)
    return [
        [r if spelt[r.folder] == r.folder else replace(r, folder=spelt[r.folder]) for r in records] for records in found
    ]
