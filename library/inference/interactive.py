"""Generate from prompts that are typed or piped, one per line; a mistake in a line does not end the session."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TextIO

from library.errors import UserError
from library.inference.failures import OutOfMemory, naming_memory

logger = logging.getLogger(__name__)


class Session(Protocol):
    """A model that is ready to generate."""

    def generate_typed(self, line: str, where: str) -> list[Path]:
        """Generate the images of one line; messages call it ``where``."""
        ...

    def free(self) -> None:
        """Free memory after an out-of-memory error."""
        ...


def generate_lines(session: Session, lines: TextIO, remedy: str) -> list[Path]:
    """Generate each line; errors are printed, and the next line is read.

    Args:
        remedy: advice if an image needs too much memory.

    Returns:
        the files, in the order in which they were written.
    """
    written: list[Path] = []
    for number, line in enumerate(_typed(lines), start=1):
        where = f"prompt {number}"
        try:
            with naming_memory(remedy):
                written += session.generate_typed(line, where)
        except OutOfMemory as error:
            session.free()
            logger.error("%s: %s", where, error)
        except UserError as error:
            logger.error("%s", error)
        except KeyboardInterrupt:
            logger.info("%s: stopped", where)
            break
    return written


def _typed(lines: TextIO) -> Iterator[str]:
    """Yield lines up to the first empty one, the end of the file, or Ctrl-C.

    They are read as bytes, because a text stream drops everything that it has read ahead at the first wrong byte.
    """
    source = getattr(lines, "buffer", lines)
    while True:
        if lines.isatty():
            print("prompt (an empty line ends): ", end="", file=sys.stderr, flush=True)
        try:
            raw = source.readline()
        except KeyboardInterrupt:
            return
        try:
            line = (raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw).strip()
        except UnicodeDecodeError:
            logger.error("the line is not UTF-8 text")
            continue
        if not line:
            return
        yield line
