"""List the images of a folder, for tools that work on images one by one."""

from __future__ import annotations

import os
from pathlib import Path

from library.data.image_io import is_image_name
from library.errors import UserError


def list_images(folder: Path, *, recursive: bool, flag: str) -> list[Path]:
    """Return the images of a folder as training finds them, sorted by path.

    Args:
        recursive: look into its folders too, save hidden ones.
        flag: the option that named the folder, for messages.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder" if not folder.exists() else f"{flag} {folder}: is a file")
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(place, name) for name in files if is_image_name(name)]
    if not found:
        deeper = "" if recursive else " (folders in it are searched with --recursive)"
        raise UserError(f"{flag} {folder}: has no images{deeper}")
    return sorted(found)
