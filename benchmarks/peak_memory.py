"""The peak host memory of a process that is started here (Linux).

What ``wait4`` returns is no measure of it: a child has its parent's memory from the fork until it starts its program, and
the parent of a benchmark holds models.
"""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from types import TracebackType

#: seconds between two readings; the kernel keeps the highest value, so only growth right before the end is missed
_EVERY = 0.02


class PeakMemory:
    """A context in which a process is watched; ``bytes`` afterwards is what it had at most."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            with contextlib.suppress(OSError):  # it has ended
                if found := re.search(r"^VmHWM:\s+(\d+) kB", self._status.read_text(), re.MULTILINE):
                    self.bytes = int(found[1]) * 1024
