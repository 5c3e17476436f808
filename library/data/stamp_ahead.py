"""Stamp a folder's images in a second process from the end, while the first one works from the beginning.

Asking the system for files' sizes and times is most of the work of a start where everything is remembered, and threads
of one process would only wait for each other's lock. Neither process waits for the other: what the second one has found
by the time the first one gets there is used, and where there is no free core the first one does it all. This file is
also the program that the second process runs, so it imports nothing of the suite's, and starts in 10 ms.
"""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

#: images between two deliveries, a few ms of work
_BLOCK = 1024

#: bytes before each delivery that say how long it is
_LENGTH = 8

#: names that differ in case only are one file there
_IGNORES_CASE = sys.platform in ("win32", "darwin")


def images_and_others(names: Sequence[str], endings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of a folder's images, and its other names; hidden files are no images.

    Args:
        endings: of images' names, in small letters.
    """
    images: list[str] = []
    others: list[str] = []
    kinds: dict[str, bool] = {}  # by the part after the last dot
    for name in names:
        ending = name.rpartition(".")[2]
        is_image = kinds.get(ending)
        if is_image is None:
            is_image = kinds[ending] = f".{ending}".lower() in endings
        (images if is_image and name[0] != "." else others).append(name)
    return images, others


def by_name(names: Sequence[str]) -> dict[str, str]:
    """Return a map: file names as the system compares them -> as they are written."""
    return {name.lower(): name for name in names} if _IGNORES_CASE else dict(zip(names, names, strict=True))


def caption_of(image: str, others: Mapping[str, str], extension: str) -> str | None:
    """Return the caption file of an image, ``<stem><extension>``, or of the image that it was cut from.

    The latter is the stem without its last four parts (``name_x0_y0_x1_y1``).

    Args:
        others: the folder's files that are no images, from ``by_name``.
    """
    stem = image.rpartition(".")[0]
    wanted = stem + extension
    caption = others.get(wanted.lower() if _IGNORES_CASE else wanted)
    if caption is None and stem.count("_") >= 4:
        wanted = stem.rsplit("_", 4)[0] + extension
        caption = others.get(wanted.lower() if _IGNORES_CASE else wanted)
    return caption


def stamp_of(image: str, caption: str | None, folder: int | None = None) -> str:
    """Return the stamp of an image and its caption: sizes in bytes, modification times, the caption's name.

    Args:
        image: its path, or its name in ``folder``; as ``caption`` is.
        folder: descriptor of the folder that both are in.

    Raises:
        OSError: one is gone, or is a broken link.
    """
    found = os.stat(image, dir_fd=folder)
    if caption is None:
        return f"{found.st_size} {found.st_mtime_ns}"
    beside = os.stat(caption, dir_fd=folder)
    name = caption if folder is not None else os.path.basename(caption)
    return f"{found.st_size} {found.st_mtime_ns} {beside.st_size} {beside.st_mtime_ns} {name}"


def has_caption(stamp: str) -> bool:
    """Whether a stamp belongs to an image with a caption file."""
    return stamp.count(" ") > 1


def deliver_stamps(folder: str, extension: str, endings: Sequence[str], to: int) -> None:
    """Write the stamps of all existing images to a file, block by block, the last names first.

    Args:
        extension: of caption files.
        endings: see ``images_and_others``.
    """
    images, others = images_and_others(os.listdir(folder), endings)
    images.sort(reverse=True)
    captions = by_name(others)
    opened = os.open(folder, os.O_RDONLY)
    for start in range(0, len(images), _BLOCK):
        found = {}
        for image in images[start : start + _BLOCK]:
            try:
                found[image] = stamp_of(image, caption_of(image, captions, extension), opened)
            except OSError:
                continue
        block = marshal.dumps(found)
        block = len(block).to_bytes(_LENGTH, "little") + block
        if os.write(to, block) < len(block):
            return  # the disk is full: nothing after half a block could be read


class StampsAhead:
    """The results of ``deliver_stamps`` so far, from a second process; empty where there cannot be one."""

    def __init__(self, folder: Path, extension: str, endings: Sequence[str]) -> None:
        self._found: dict[str, str] = {}
        self._lock = threading.Lock()
        self._read = 0  # bytes of the delivered
        self._process: subprocess.Popen[bytes] | None = None
        if not sys.executable or sys.platform == "win32" or (os.cpu_count() or 1) < 2:
            return
        # without site-packages and the environment's settings, which it does not need
        command = [sys.executable, "-I", "-S", __file__, str(folder), extension, *endings]
        try:
            self._delivered = tempfile.TemporaryFile(buffering=0)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._delivered, stderr=subprocess.DEVNULL
            )
        except OSError:
            return

    def stamps(self) -> dict[str, str]:
        """Return the stamps received so far, by image; the same object each time."""
        if self._process is not None:
            with self._lock:
                self._take()
        return self._found

    def _take(self) -> None:
        file = self._delivered.fileno()
        there = os.fstat(file).st_size
        while there - self._read > _LENGTH:
            length = int.from_bytes(os.pread(file, _LENGTH, self._read), "little")
            start = self._read + _LENGTH
            if there < start + length:  # still being written
                return
            self._found.update(marshal.loads(os.pread(file, length, start)))
            self._read = start + length

    def stop(self) -> None:
        """Stop the second process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._delivered.close()


if __name__ == "__main__":
    deliver_stamps(sys.argv[1], sys.argv[2], sys.argv[3:], sys.stdout.fileno())
