"""Stamps of part of a folder's files, taken by a second process while the first one looks at the pictures.

Asking the system for a file's size and time is most of the work of a start where everything is remembered, and threads
of one process would only wait for each other's lock. This file is also the program that the second process runs, so
it imports nothing of the suite's, and starts in 10 ms.
"""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def file_stamp(path: str) -> str:
    """Size in bytes and time of the last change in ns.

    Raises:
        OSError: it is gone, or a link that leads nowhere.
    """
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns}"


def stamps(folder: str, ending: str) -> dict[str, str]:
    """By name, of the files whose names end so, and of every second other one; none of what cannot be asked for.

    That is three quarters of a folder of pictures and captions, done while the first process lists it, reads what it
    remembers of it, and stamps the rest.
    """
    names = os.listdir(folder)
    wanted = [name for name in names if name.endswith(ending)]
    wanted += [name for name in names if not name.endswith(ending)][::2]
    found = {}
    prefix = f"{folder}{os.sep}"
    for name in wanted:
        try:
            found[name] = file_stamp(prefix + name)
        except OSError:
            continue
    return found


class StampsAhead:
    """What ``stamps`` finds in a second process; nothing where there cannot be one."""

    def __init__(self, folder: Path, ending: str) -> None:
        self._found: dict[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        if not sys.executable or sys.platform == "win32" or (os.cpu_count() or 1) < 2:
            self._found = {}
            return
        # neither site-packages nor the environment's settings: it needs nothing of either
        command = [sys.executable, "-I", "-S", __file__, str(folder), ending]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._found = {}

    def stamps(self) -> Mapping[str, str]:
        """By name; waits for the other process the first time."""
        if self._found is None:
            self._found = self._received()
        return self._found

    def _received(self) -> dict[str, str]:
        assert self._process is not None
        with self._process as process:
            assert process.stdout is not None
            sent = process.stdout.read()
        try:
            found = marshal.loads(sent) if process.returncode == 0 else {}
        except (ValueError, EOFError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.stdout.buffer.write(marshal.dumps(stamps(sys.argv[1], sys.argv[2])))
