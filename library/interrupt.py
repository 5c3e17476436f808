"""Handle Ctrl-C, SIGTERM and a closed terminal: the first signal asks the work to end, the second stops it at once.

Long work reads ``requested`` between its pieces, or calls ``check``, which raises ``Stopped``. Work that must not be
lost, such as the last save, runs within ``finishing``, where a second signal waits for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO

#: a terminal that closes, and the same on Windows, where the system has these signals
_HANGUP = getattr(signal, "SIGHUP", None)
_SIGNALS = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, _HANGUP, getattr(signal, "SIGBREAK", None))
    if number is not None
]


class Stopped(Exception):
    """Raised by ``Interrupt.check``; the caller that began the work decides what it means."""


class Interrupt:
    """A context in which SIGINT, SIGTERM and SIGHUP set a flag instead of ending the program.

    A SIGHUP that was ignored before, by ``nohup``, stays ignored. ``exit_code`` is 128 + the signal's number, as in
    shells: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

    Args:
        promise: printed at the first signal: what is still done.
    """

    def __init__(self, promise: str = "stopping: this step is finished, then weights and state are saved") -> None:
        self._promise = promise
        self.signal_number: int | None = None
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        self._finishing = False

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal_number or signal.SIGINT)

    def check(self) -> None:
        """Raise Stopped if the work should end."""
        if self.requested:
            raise Stopped

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish what begins within the context: the next signal only prints a line, the one after it stops at once."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def __enter__(self) -> Interrupt:
        for number in _SIGNALS:
            if number == _HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                # not in the main thread: a wrapper runs the trainer in a thread and handles signals itself
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked loader worker inherited this handler. The terminal sends Ctrl-C to the whole group,
            # but the main process still needs its workers to finish the step; SIGTERM is from the loader.
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if number == _HANGUP:
            _print_to_nowhere()
        if not self.requested:
            self.signal_number = number
            _say(f"\n{self._promise} (repeat to stop at once)")
        elif self._finishing:
            self._finishing = False
            _say("\nweights and state are being saved, which ends soon (repeat to stop at once)")
        else:
            _say("stopped at once; files already written are whole")
            os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # nobody listens; the signal came while something was printed
        print(text, file=sys.stderr, flush=True)


def _print_to_nowhere() -> None:
    """Make printing safe after the terminal, or the reader of a pipe, is gone."""
    for stream, handle in ((sys.stdout, 1), (sys.stderr, 2)):
        with contextlib.suppress(OSError):
            mode = os.fstat(handle).st_mode
            if stat.S_ISCHR(mode) and not os.isatty(handle):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)
            elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                wrapped = _WithoutErrors(stream)
                sys.stdout, sys.stderr = (wrapped, sys.stderr) if handle == 1 else (sys.stdout, wrapped)


class _WithoutErrors(io.TextIOBase):
    """A text stream that ignores write errors."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()
