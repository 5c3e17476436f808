"""Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second stops at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType


class Interrupt:
    """A context in which SIGINT and SIGTERM set a flag instead of ending the program.

    ``exit_code`` is 128 + the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        promise: said at the first signal: what is still done.
    """

    def __init__(self, promise: str = "stopping: this step is finished, then weights and state are saved") -> None:
        self._promise = promise
        self.signal_number: int | None = None
        self._owner = os.getpid()
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal_number or signal.SIGINT)

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                # not the main thread (a wrapper runs the trainer in a thread): it handles signals itself
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked loader worker inherited this handler. The terminal sends Ctrl-C to the whole group,
            # but the main process still needs its workers to finish the step; SIGTERM is from the loader.
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if self.requested:
            print("stopped at once; files already written are whole", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.signal_number = number
        print(f"\n{self._promise} (repeat to stop at once)", file=sys.stderr, flush=True)
