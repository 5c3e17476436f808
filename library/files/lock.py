"""A lock on a file's name, held by one process until it ends, however it ends.

The lock is the operating system's, on a small hidden file: a process that dies loses it, so none is ever left behind.
The file itself may be left by a process that was killed; it means nothing by itself, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.files.atomic import MAX_NAME

logger = logging.getLogger(__name__)

#: the locked byte is far behind the text, because Windows does not let others read locked bytes
_LOCKED_BYTE = 1 << 30
#: what this process holds: on POSIX a process's own second lock on a file would succeed
_held: set[Path] = set()


class Held(Exception):
    """Another process has the lock; ``owner`` says which, as far as is known."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


def lock_path(folder: Path, name: str) -> Path:
    """Return the hidden lock file of a name in a folder."""
    found = f".{name}.lock"
    return folder / (
        found if len(os.fsencode(found)) <= MAX_NAME else f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.lock"
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which is made and removed.

    Raises:
        Held: another process has it, or this one already.
        OSError: the file cannot be made.
    """
    path = path.absolute()
    if path in _held:
        raise Held("this process")
    handle = _open_locked(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        _close(handle, path)


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(handle):
            owner = os.pread(handle, 200, 0) if hasattr(os, "pread") else os.read(handle, 200)
            os.close(handle)
            raise Held(owner.decode("utf-8", "replace").strip() or "another process")
        if _is_same(handle, path):
            break
        os.close(handle)  # the one before removed it in between
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def _lock(handle: int) -> bool:
    """Lock a file if nobody else has; also true where the file system knows no locks."""
    if os.name == "nt":
        msvcrt: Any = importlib.import_module("msvcrt")  # which only Windows has
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        # not flock(), which forked loader processes would continue to hold
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.debug("no locks on this file system: %s", error)
    return True


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _close(handle: int, path: Path) -> None:
    if os.name == "nt":  # where an open file cannot be removed
        os.close(handle)
    with contextlib.suppress(OSError):
        path.unlink()
    if os.name != "nt":  # removed before it is let go: whoever waits finds that it is another file
        os.close(handle)
