"""Make text that may come from file names safe to show and to write."""

from __future__ import annotations

import re

#: characters that move the cursor, colour or delete on a terminal, or turn the writing direction; not tab and new line
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

#: characters of a word in a message, and of its start and end that are shown of a longer one
_LONGEST, _START, _END = 500, 200, 50


def printable(text: str) -> str:
    """Return text that every encoding can hold: the stand-ins for damaged file names are replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def visible(text: str) -> str:
    """``printable`` text with its control characters written out, such as ``\\x1b``, so that a name cannot hide or fake
    what a terminal shows."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], printable(text))


def one_line(text: str) -> str:
    """Return text for one line of a message: ``visible``, its ends of lines too, and endless words shortened."""
    text = visible(text).replace("\n", "\\n")
    return re.sub(rf"\S{{{_LONGEST + 1},}}", lambda found: f"{found[0][:_START]}...{found[0][-_END:]}", text)
