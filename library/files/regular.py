"""Opening files that may be anything: pipes, sockets and devices are refused instead of waited for."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str]) -> int:
    """Return a file descriptor for reading.

    Opening a named pipe would wait for a writer, and reading from a device may never end.

    Raises:
        OSError: the file is missing, may not be read, or is something else than a file.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "a pipe or device, not a file", os.fspath(path))
