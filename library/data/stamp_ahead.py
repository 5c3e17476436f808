"""Stamps of a folder's files, taken by a second process from the end while the first one works from the beginning.

Asking the system for a file's size and time is most of the work of a start where everything is remembered, and threads
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
from pathlib import Path

#: files between two deliveries, a few ms of work
_BLOCK = 2048

#: bytes before each delivery that say how long it is
_LENGTH = 8


def file_stamp(name: str, folder: int | None = None) -> str:
    """Size in bytes and time of the last change in ns.

    Args:
        folder: descriptor of the folder that ``name`` is in; a path otherwise.

    Raises:
        OSError: it is gone, or a link that leads nowhere.
    """
    found = os.stat(name, dir_fd=folder)
    return f"{found.st_size} {found.st_mtime_ns}"


def deliver_stamps(folder: str, to: int) -> None:
    """Write the stamps of all files to a file, block by block, the last names first; nothing of files that are gone."""
    names = sorted(os.listdir(folder), reverse=True)
    opened = os.open(folder, os.O_RDONLY)
    for start in range(0, len(names), _BLOCK):
        found = {}
        for name in names[start : start + _BLOCK]:
            try:
                found[name] = file_stamp(name, opened)
            except OSError:
                continue
        block = marshal.dumps(found)
        block = len(block).to_bytes(_LENGTH, "little") + block
        if os.write(to, block) < len(block):
            return  # the disk is full: after half a block nothing would be read right


class StampsAhead:
    """What ``deliver_stamps`` has found so far in a second process; nothing where there cannot be one."""

    def __init__(self, folder: Path) -> None:
        self._found: dict[str, str] = {}
        self._lock = threading.Lock()
        self._read = 0  # bytes of the delivered
        self._process: subprocess.Popen[bytes] | None = None
        if not sys.executable or sys.platform == "win32" or (os.cpu_count() or 1) < 2:
            return
        # neither site-packages nor the environment's settings: it needs nothing of either
        command = [sys.executable, "-I", "-S", __file__, str(folder)]
        try:
            self._delivered = tempfile.TemporaryFile(buffering=0)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._delivered, stderr=subprocess.DEVNULL
            )
        except OSError:
            return

    def stamps(self) -> dict[str, str]:
        """By name, those that are here by now; the same object each time."""
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
        """Nothing more is needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._delivered.close()


if __name__ == "__main__":
    deliver_stamps(sys.argv[1], sys.stdout.fileno())
