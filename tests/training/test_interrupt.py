"""Signals in a real process: the first asks, the second stops."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from library.training.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.requested:
        time.sleep(0.01)
    print("finishing", flush=True)
    time.sleep({pause})
    print("saved", flush=True)
    sys.exit(interrupt.exit_code)
"""


def start(pause: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(pause=pause)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_lets_the_work_finish(number: int, code: int) -> None:
    process = start(pause=0.0)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "saved" in out
    assert "stopping" in err and "Traceback" not in err


def test_second_signal_stops_at_once() -> None:
    process = start(pause=60.0)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "finishing\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    assert "saved" not in out
    assert "Traceback" not in err


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    from library.training.interrupt import Interrupt

    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
