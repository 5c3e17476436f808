"""List the files of an image folder, and recognize those of an earlier run.

Everything here is done for every image at every start, for a hundred thousand of them in well under a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.data.image_io import EXTENSIONS
from library.data.stamp_ahead import StampsAhead, by_name, caption_of, images_and_others, stamp_of


class ImageFolder:
    """One listing of a folder; a context, after which only names are available.

    Args:
        caption_extension: as in ``<stem><extension>``.
        stamps_ahead: whether a second process takes a part of the stamps, which is worth its start (about 10 ms) if
            ``stamped`` will be called for many images.
    """

    def __init__(self, path: Path, caption_extension: str, *, stamps_ahead: bool = False) -> None:
        self._prefix = f"{path}{os.sep}"
        self._extension = caption_extension
        self._ahead = StampsAhead(path, caption_extension, EXTENSIONS) if stamps_ahead else None
        # names are found faster from the opened folder than by their paths
        self._opened = os.open(path, os.O_RDONLY) if os.stat in os.supports_dir_fd else None
        #: names of the images, in order; folders of such names, which are rare, are among them (``is_folder``)
        self.images, others = images_and_others(os.listdir(path), EXTENSIONS)
        self.images.sort()
        self._others = by_name(others)

    def __enter__(self) -> ImageFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ahead is not None:
            self._ahead.stop()
        if self._opened is not None:
            os.close(self._opened)

    def path(self, name: str) -> str:
        return self._prefix + name

    def is_folder(self, name: str) -> bool:
        return os.path.isdir(self.path(name))

    def caption(self, image: str) -> str | None:
        """Return the name of the image's caption file."""
        return caption_of(image, self._others, self._extension)

    def stamped(self, images: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """Yield each image with a stamp of it and its caption, or ``None`` if it is gone."""
        found = self._ahead.stamps() if self._ahead is not None else {}
        for image in images:
            yield image, found.get(image) or self._stamp(image)

    def _stamp(self, image: str) -> str | None:
        caption = self.caption(image)
        prefix = self._prefix if self._opened is None else ""
        try:
            return stamp_of(prefix + image, None if caption is None else prefix + caption, self._opened)
        except OSError:  # or a broken link: reading reports what is wrong
            return None
