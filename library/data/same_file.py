"""One file or folder under several paths: links, ``..`` and relative paths are seen through."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from library.data.records import ImageRecord

_FOLDER = operator.attrgetter("folder")


def same_file(path: Path) -> Hashable:
    """What all paths to a file or folder have in common."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    # some network drives number no files
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def with_one_spelling(found: Sequence[list[ImageRecord]]) -> list[list[ImageRecord]]:
    """The records of several datasets with one path for each folder, of several the one that comes first.

    Caches are files beside images. Known by two paths, an image's file would be written twice at once, and one
    writer would lose what the other added.
    """
    # told apart as objects first, as all records of a folder share one
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
