"""Text that may come from names of files, as consoles and files can show it."""

from __future__ import annotations

import re

#: what moves the cursor, colours or deletes on a terminal, or turns the direction of writing; not tab and new line
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that every encoding of the console and of files can hold: what stands for damaged file names is replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def visible(text: str) -> str:
    """``printable`` text with its control characters written out, such as ``\\x1b``, so that a name cannot hide or fake
    what a terminal shows."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], printable(text))
