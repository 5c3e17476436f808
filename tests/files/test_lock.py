"""Locks that end with their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from library.files import lock
from library.files.lock import Held, lock_path, locked

HOLD = """
import os, sys, time
from pathlib import Path
from library.files.lock import locked
with locked(Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(10)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".name.lock"
    process = hold(path)
    with pytest.raises(Held, match=f"process {process.pid} on "), locked(path):
        pass
    process.kill()
    process.wait()
    assert path.exists()  # which means nothing
    with locked(path):
        assert str(os.getpid()) in path.read_text()
        with pytest.raises(Held), locked(path):
            pass
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_children_do_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / ".name.lock"
    process = hold(path, "fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(path):
        pass


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before removes its file between our opening and our locking."""
    path = tmp_path / ".name.lock"
    real, calls = lock._lock, []

    def once_removed(handle: int) -> bool:
        if not calls:
            path.unlink()
        calls.append(handle)
        return real(handle)

    monkeypatch.setattr(lock, "_lock", once_removed)
    with locked(path):
        assert len(calls) == 2 and path.exists()


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call for locks, played by this system's."""
    import fcntl

    asked = []

    def locking(handle: int, mode: int, count: int) -> None:
        asked.append((os.lseek(handle, 0, os.SEEK_CUR), mode, count))
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)

    other = hold(tmp_path / ".taken.lock")
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(lock.os, "name", "nt")
    try:
        handle = lock._open_locked(tmp_path / ".name.lock")
        assert asked == [(1 << 30, 2, 1)]
        lock._close(handle, tmp_path / ".name.lock")
        assert not (tmp_path / ".name.lock").exists()
        with pytest.raises(Held, match=str(other.pid)):
            lock._open_locked(tmp_path / ".taken.lock")
    finally:
        monkeypatch.undo()
        other.kill()


def test_long_names(tmp_path: Path) -> None:
    with locked(lock_path(tmp_path, "n" * 250)):
        pass
    assert lock_path(tmp_path, "tiny").name == ".tiny.lock"
