"""Reading ``--network_args key=value``: values are text, wrong ones are refused with the key and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from library.errors import UserError, did_you_mean

Reader = Callable[[str], Any]

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


def read_bool(text: str) -> bool:
    """``"False"`` is false: only the listed words are accepted, in any case."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("must be true or false")


def read_rank(text: str) -> int:
    """A whole number from 0; 0 means no adapter there."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None
    if value < 0:
        raise ValueError("must not be negative")
    return value


def read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def read_positive(text: str) -> float:
    value = read_number(text)
    if not value > 0:
        raise ValueError("must be greater than 0")
    return value


def read_probability(text: str) -> float:
    """At 1 nothing would ever be trained, so the range is [0, 1)."""
    value = read_number(text)
    if not 0 <= value < 1:
        raise ValueError("must be at least 0 and less than 1")
    return value


def list_reader(item: Reader, count: int) -> Reader:
    """A reader of exactly ``count`` comma-separated values."""

    def read(text: str) -> tuple[Any, ...]:
        words = [word.strip() for word in text.split(",")]
        if len(words) != count:
            raise ValueError(f"must have {count} comma-separated values, has {len(words)}")
        values = []
        for place, word in enumerate(words):
            try:
                values.append(item(word))
            except ValueError as error:
                raise ValueError(f'value {place + 1} ("{word}") {error}') from None
        return tuple(values)

    return read


def read_network_args(given: Mapping[str, object], readers: Mapping[str, Reader], module: str) -> dict[str, Any]:
    """Read the values of the keys in ``readers``; keys whose value is ``None`` count as not given.

    Args:
        given: keys and values as on the command line; values that are not text are read by their ``str``.
        readers: the reader of each known key; raises ``ValueError`` saying what the value must be.
        module: the network module's name, for messages.

    Raises:
        UserError: for all unknown keys and unreadable values at once, one line each.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in given.items():
        if key not in readers:
            hint, known = did_you_mean(key, readers), ", ".join(sorted(readers))
            problems.append(f'--network_args: {module} has no option "{key}"{hint}; known: {known}')
        elif value is not None:
            try:
                values[key] = readers[key](str(value))
            except ValueError as error:
                problems.append(f'--network_args {key}="{value}": {error}')
    if problems:
        raise UserError("\n".join(problems))
    return values
