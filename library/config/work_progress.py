"""Show the progress of work outside of steps: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

from library.config.console import PLAIN_LINE_INTERVAL, is_rich, make_bar

logger = logging.getLogger(__name__)


class WorkProgress:
    """Counts completed pieces of work; a context, shown from the first ``update`` on.

    Args:
        title: the activity, e.g. "encoding images".
        unit: the counted things, for the rate, e.g. "images".
        simple: plain lines on a terminal too.
        enabled: whether to show anything; one process of several does.
    """

    def __init__(self, title: str, unit: str, *, simple: bool, enabled: bool = True) -> None:
        self._title, self._unit = title, unit
        self._is_rich = is_rich(simple=simple)
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> WorkProgress:
        self._started = self._last_line = time.monotonic()
        return self

    def update(self, done: int, total: int) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        rate = f"{done / max(now - self._started, 1e-9):.1f} {self._unit}/s"
        if self._is_rich:
            if self._bar is None:
                self._bar = make_bar(self._title)
                self._task = self._bar.add_task("", total=total)
                self._bar.start()
            self._bar.update(self._task, completed=done, description=rate)
        elif now - self._last_line >= PLAIN_LINE_INTERVAL or (done == total and self._last_line > self._started):
            self._last_line = now
            logger.info("%s: %d of %d, %s", self._title, done, total, rate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
