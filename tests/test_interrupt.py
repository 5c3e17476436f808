"""Signals in a real process: the first asks, the second stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.interrupt import Interrupt, Stopped

PROGRAM = """
import sys, time
from pathlib import Path
from library.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.requested:
        time.sleep(0.01)
    print("finishing", flush=True)
    {body}
    print("saved", flush=True)
    Path({saved!r}).touch()
    sys.exit(interrupt.exit_code)
"""
SLEEP = "time.sleep(60)"
SAVE = "with interrupt.finishing(): print('saving', flush=True); time.sleep({seconds})"

posix = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="terminals hang up on POSIX")


def start(body: str = "", saved: Path | str = os.devnull, **popen: object) -> subprocess.Popen[str]:
    program = PROGRAM.format(body=body, saved=str(saved))
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
    process = subprocess.Popen([sys.executable, "-c", program], **settings)
    if process.stdout is not None:
        assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@posix
def test_first_signal_lets_the_work_finish(name: str, code: int) -> None:
    process = start()
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "saved" in out
    assert "stopping" in err and "Traceback" not in err


def test_second_signal_stops_at_once() -> None:
    process = start(SLEEP)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "finishing\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    assert "saved" not in out
    assert "Traceback" not in err


def test_second_signal_lets_a_save_finish() -> None:
    process = start(SAVE.format(seconds=1))
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["finishing\n", "saving\n"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "saved" in out
    assert "are being saved" in err


def test_third_signal_does_not_wait_for_a_save() -> None:
    process = start(SAVE.format(seconds=60))
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["finishing\n", "saving\n"]
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.stderr.readline() + process.stderr.readline()
    assert "are being saved" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "saved" not in out


@posix
def test_a_terminal_that_closes_loses_nothing(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and all that is printed afterwards fails."""
    import pty

    ours, theirs = pty.openpty()
    command = "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    program = command + f"exec({PROGRAM.format(body='', saved=str(tmp_path / 'saved'))!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while b"ready" not in text:
        text += os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=20) == 129
    assert (tmp_path / "saved").exists()


@posix
def test_a_reader_that_goes_with_the_terminal(tmp_path: Path) -> None:
    """Such as tee: it gets the signal, too."""
    process = start(saved=tmp_path / "saved", stderr=subprocess.STDOUT)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == 129
    assert (tmp_path / "saved").exists()


@posix
def test_nohup_is_respected() -> None:
    process = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_work_asks() -> None:
    interrupt = Interrupt()
    interrupt.check()
    interrupt.signal_number = signal.SIGINT
    with pytest.raises(Stopped):
        interrupt.check()
