"""Set up log lines: where they go and how they look."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.config.arguments import ConsoleOptions
from library.errors import UserError
from library.plain_text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

#: loggers whose lines are for their developers
_NOISY = ("accelerate", "PIL", "httpx", "httpx2", "urllib3", "matplotlib", "filelock", "fsspec", "diffusers")

#: seconds between two plain progress lines where there is no terminal
PLAIN_LINE_INTERVAL = 10.0


class _Formatter(logging.Formatter):
    """Escapes control characters, which file names may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def setup_console(options: ConsoleOptions) -> None:
    """Set up the root logger: rich on a terminal, plain lines elsewhere, a file if one is named.

    Raises:
        UserError: the file cannot be written.
    """
    level = getattr(logging, options.console_log_level or "INFO")
    handler: logging.Handler
    if options.console_log_file:
        try:
            handler = logging.FileHandler(options.console_log_file, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--console_log_file {options.console_log_file}: cannot be written ({error.strerror})"
            ) from None
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    elif is_rich(simple=options.console_log_simple):
        from rich.logging import RichHandler

        handler = RichHandler(console=stderr_console(), show_path=False)
        handler.setFormatter(_Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    # it warns at each import of a 4-bit kernel that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet(level: int) -> Iterator[None]:
    """Suppress log lines of this level and below within the context."""
    before = logging.root.manager.disable
    logging.disable(max(before, level))
    try:
        yield
    finally:
        logging.disable(before)


def is_rich(*, simple: bool) -> bool:
    """Whether tables and progress bars are shown: on a terminal, unless ``--console_log_simple`` is given."""
    return sys.stderr.isatty() and not simple


@functools.cache
def stderr_console() -> Console:
    """Return the one console, so that log lines appear above a progress bar and not in it."""
    from rich.console import Console

    return Console(stderr=True)


def make_bar(title: str) -> Progress:
    """Return a progress bar for the terminal: title, share, counts, labelled times, the task's text; to be started."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=stderr_console(),
    )
