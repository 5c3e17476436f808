"""The files of a folder of pictures: which are there, and whether they are the ones of an earlier run.

Everything here is done for every picture at every start, for a hundred thousand of them in well under a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.data.image_io import is_picture_name
from library.data.stamp_ahead import StampsAhead, file_stamp

#: names that differ in case only are one file there
_IGNORES_CASE = sys.platform in ("win32", "darwin")


class PictureFolder:
    """One listing of a folder; a context, after which only names are at hand.

    Args:
        caption_extension: as in ``<stem><extension>``.
        stamps_ahead: whether a second process takes part of the stamps from now on, which is worth its start (about
            10 ms) if ``stamped`` is going to be asked for many pictures.
    """

    def __init__(self, path: Path, caption_extension: str, *, stamps_ahead: bool = False) -> None:
        self._prefix = f"{path}{os.sep}"
        self._extension = caption_extension
        self._ahead = StampsAhead(path) if stamps_ahead else None
        # names are found quicker from the opened folder than by their paths
        self._opened = os.open(path, os.O_RDONLY) if os.stat in os.supports_dir_fd else None
        #: names of the pictures, in order
        self.pictures: list[str] = []
        others: list[str] = []
        self._list(path, others)
        self._others = (
            {_key(name): name for name in others} if _IGNORES_CASE else dict(zip(others, others, strict=True))
        )

    def __enter__(self) -> PictureFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ahead is not None:
            self._ahead.stop()
        if self._opened is not None:
            os.close(self._opened)

    def _list(self, path: Path, others: list[str]) -> None:
        pictures = self.pictures
        kinds: dict[str, bool] = {}  # by the part after the last dot
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                ending = name.rpartition(".")[2]
                is_picture = kinds.get(ending)
                if is_picture is None:
                    is_picture = kinds[ending] = is_picture_name("a." + ending)
                if not is_picture or name[0] == ".":
                    others.append(name)
                elif not entry.is_dir():
                    # a link that leads nowhere is one too, to be named as unreadable
                    pictures.append(name)
        pictures.sort()

    def path(self, name: str) -> str:
        return self._prefix + name

    def captioned(self, pictures: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """Each picture with its caption file's name, or ``None``."""
        for picture in pictures:
            stem = picture.rpartition(".")[0]
            yield picture, self._others.get(_key(stem + self._extension)) or self._of_whole(stem)

    def stamped(self, pictures: Sequence[str]) -> Iterator[tuple[str, str | None, str | None]]:
        """The same with what tells both files from later ones, or ``None`` for what is gone.

        That is the sizes in bytes and the times of the last change in ns, and the caption's name.
        """
        # names at hand, and no calls of ``captioned`` and others: a tenth of a second for a hundred thousand
        extension, others, folder = self._extension, self._others, self._opened
        prefix = self._prefix if folder is None else ""
        ahead = self._ahead.stamps() if self._ahead is not None else {}
        for picture in pictures:
            stem = picture.rpartition(".")[0]
            wanted = stem + extension
            caption = others.get(_key(wanted) if _IGNORES_CASE else wanted) or self._of_whole(stem)
            try:
                own = ahead.get(picture) or file_stamp(prefix + picture, folder)
                if caption is not None:
                    own = f"{own} {ahead.get(caption) or file_stamp(prefix + caption, folder)} {caption}"
            except OSError:  # or a link that leads nowhere: reading says what is wrong
                yield picture, caption, None
            else:
                yield picture, caption, own

    def _of_whole(self, stem: str) -> str | None:
        """The caption of the picture that this one was cut from, by its stem without its last four parts."""
        return self._others.get(_key(stem.rsplit("_", 4)[0] + self._extension)) if stem.count("_") >= 4 else None


def _key(name: str) -> str:
    return name.lower() if _IGNORES_CASE else name
