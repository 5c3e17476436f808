"""Names of the images that the scripts write."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from library.errors import UserError
from library.files.atomic import make_folder


def try_folder(directory: Path) -> None:
    """Make the folder for images and try to write there, before minutes are spent on an image.

    Raises:
        UserError: it cannot be made, or nothing can be written there.
    """
    make_folder(directory)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise UserError(f"{directory}: images cannot be written there ({error.strerror})") from None


class FileNames:
    """``im_<time>_<number>_<seed>.png``, or ``im_<number>.png``, which continues after existing files."""

    def __init__(self, directory: Path, *, sequential: bool = False) -> None:
        self._directory = directory
        self._stamp = None if sequential else time.strftime("%Y%m%d%H%M%S", time.localtime())
        self._number = 0
        self._used: set[str] = set()
        if sequential and directory.is_dir():
            taken = [re.fullmatch(r"im_(\d{6,})\.png", path.name) for path in directory.iterdir()]
            self._number = max((int(match[1]) for match in taken if match), default=0)

    def named(self, name: str) -> Path:
        """Return the path of a file of the user's own name; an older image of that name is replaced.

        The ending ``.png`` is added if it is missing.
        """
        return self._directory / (name if name.lower().endswith(".png") else f"{name}.png")

    def once(self, stem: str) -> Path:
        """Return ``<stem>.png``, and ``<stem>_2.png`` and so on for further images of this run."""
        name, number = f"{stem}.png", 1
        while name in self._used:
            number += 1
            name = f"{stem}_{number}.png"
        self._used.add(name)
        return self.named(name)

    def next(self, seed: int) -> Path:
        """Return a free name: another run may have begun in the same second."""
        while True:
            self._number += 1
            number = f"{self._number:06d}"
            name = f"im_{number}.png" if self._stamp is None else f"im_{self._stamp}_{number}_{seed}.png"
            if not (self._directory / name).exists():
                return self._directory / name
