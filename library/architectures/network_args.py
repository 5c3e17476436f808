"""Read ``--network_args key=value``: values are text; wrong ones are refused with the key and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from library.errors import UserError, did_you_mean

Reader = Callable[[str], Any]

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


def read_bool(text: str) -> bool:
    """Read a boolean; only the listed words are accepted, in any case, and ``"False"`` is false."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("must be true or false")


def is_switched_on(words: Iterable[str] | None, key: str) -> bool:
    """Whether ``--network_args`` have ``key=True``; network modules refuse values that are not booleans."""
    pairs = (word.partition("=") for word in words or ())
    given = [value for name, _, value in pairs if name.strip() == key]
    try:
        return bool(given) and read_bool(given[-1])
    except ValueError:
        return False


def read_rank(text: str) -> int:
    """Read a whole number from 0; 0 means no adapter."""
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
    """Read a probability in [0, 1); at 1 nothing would be trained."""
    value = read_number(text)
    if not 0 <= value < 1:
        raise ValueError("must be at least 0 and less than 1")
    return value


def list_reader(item: Reader, count: int) -> Reader:
    """Return a reader of exactly ``count`` comma-separated values."""

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


#: published names of curves over the blocks -> the factor at x, which is 0 at the first block and 1 at the last
_CURVES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "sine": lambda x: math.sin(math.pi / 2 * x),
        # by the sine, whose 0 is exactly 0: cos(pi / 2) is 6e-17
        "cosine": lambda x: math.sin(math.pi / 2 * (1.0 - x)),
        "linear": lambda x: x,
        "reverse_linear": lambda x: 1.0 - x,
        "zeros": lambda x: 0.0,
    }
)


def rates_reader(count: int) -> Reader:
    """Return a reader of ``count`` factors: a list, or a curve over the blocks such as ``cosine`` or ``sine+0.25``.

    Curves rise (``sine``, ``linear``) or fall (``cosine``, ``reverse_linear``) between 0 and 1; the number after the
    plus is added to each factor.
    """
    read_list = list_reader(read_number, count)

    def read(text: str) -> tuple[float, ...]:
        name, plus, base = (part.strip() for part in text.partition("+"))
        if "," in text or not name[:1].isalpha():
            return read_list(text)
        if name not in _CURVES:
            raise ValueError(
                f"must have {count} comma-separated values, or be one of {', '.join(_CURVES)}"
                f"{did_you_mean(name, _CURVES)}, with a number to add if wanted (cosine+0.25)"
            )
        try:
            added = read_number(base) if plus else 0.0
        except ValueError:
            raise ValueError(f'"{base}" must be a number, as in {name}+0.25') from None
        return tuple(_CURVES[name](block / (count - 1)) + added for block in range(count))

    return read


@dataclass(frozen=True)
class PatternValues:
    """Values for modules by regular expressions that are searched in their names; the first match wins."""

    entries: tuple[tuple[re.Pattern[str], Any], ...] = ()

    def place_of(self, name: str) -> int | None:
        """Return the index of the entry for a module's name, or ``None``."""
        return next((index for index, (pattern, _) in enumerate(self.entries) if pattern.search(name)), None)

    def value_of(self, name: str) -> Any:
        """Return the value for a module's name, or ``None``."""
        place = self.place_of(name)
        return None if place is None else self.entries[place][1]

    def refuse_idle(self, key: str, names: Iterable[str]) -> None:
        """Raise UserError for a pattern that matches none of ``names``: it would silently do nothing."""
        names = list(names)
        for pattern, _ in self.entries:
            if not any(pattern.search(name) for name in names):
                some = ", ".join(names[:2])
                raise UserError(
                    f'--network_args {key}: "{pattern.pattern}" is in none of the {len(names)} module names, which '
                    f"are like {some}"
                )


#: up to an equals sign with a value; patterns may contain commas and equals signs
_PATTERN_VALUE = re.compile(r"\s*(.+?)=([^=,]*)(?:,|$)")


def patterns_reader(item: Reader) -> Reader:
    """Return a reader of ``regular expression=value`` pairs separated by commas."""

    def read(text: str) -> PatternValues:
        entries = []
        position = 0
        while position < len(text):
            found = _PATTERN_VALUE.match(text, position)
            if not found:
                raise ValueError(f'"{text[position:]}" is not pattern=value')
            try:
                entries.append((re.compile(found[1]), item(found[2].strip())))
            except re.error as error:
                raise ValueError(f'"{found[1]}" is no regular expression ({error})') from None
            except ValueError as error:
                raise ValueError(f'the value of "{found[1]}", "{found[2]}", {error}') from None
            position = found.end()
        if not entries:
            raise ValueError("must have pattern=value")
        return PatternValues(tuple(entries))

    return read


def read_rate(text: str) -> float:
    """Read a learning rate; 0 freezes a module."""
    value = read_number(text)
    if not 0 <= value < math.inf:
        raise ValueError("must be at least 0")
    return value


def read_network_args(
    given: Mapping[str, object],
    readers: Mapping[str, Reader],
    module: str,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Read the values of the keys in ``readers``; keys whose value is ``None`` count as not given.

    Args:
        given: keys and values as on the command line; values that are not text are read by their ``str``.
        readers: the reader of each known key; raises ``ValueError`` saying what the value must be.
        module: the network module's name, for messages.
        refused: keys that other modules know, with the reason why this one refuses them.

    Raises:
        UserError: for all unknown keys and unreadable values at once, one line each.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in given.items():
        if key in refused:
            if value is not None:
                problems.append(f"--network_args {key}: {module} cannot do it: {refused[key]}")
        elif key not in readers:
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
