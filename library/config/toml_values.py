"""Convert a TOML value to the flag's type: kind to programs, which write all of their fields, strict with mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from library.errors import did_you_mean

#: the value of an option that is in the file but not set
UNSET = object()


def converted(action: argparse.Action, value: Any) -> Any:
    """Return the value as the flag's type, or ``UNSET``.

    An empty text, an empty list and "None" mean that the option is not given. 1 and 0 are true and false for switches.
    A whole number may be written as 64.0, and a number as text.

    Raises:
        ValueError: of another type, or not among the choices.
        argparse.ArgumentTypeError: the flag's own converter refuses it.
    """
    if value in ("", "None", []):
        return UNSET
    if action.nargs == 0:
        if value not in (True, False):  # 1 and 0 are equal to them
            raise ValueError(f"expects true or false, not {value!r}")
        return bool(value)
    if action.nargs in ("*", "+"):
        values = value if isinstance(value, list) else [value]
        return [_one(action, v) for v in values if v not in ("", "None")] or UNSET
    if isinstance(value, list):
        if action.type is None or action.type is str:
            return ",".join(str(v) for v in value)  # resolution = [512, 768]
        raise ValueError(f"expects one value, not {value!r}")
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    kind = action.type
    if isinstance(value, (list, Mapping)):
        raise ValueError(f"expects {_type_name(kind)}, not {value!r}")
    if isinstance(value, bool):
        raise ValueError(f"expects {_type_name(kind)}, not {str(value).lower()}")
    if kind in (int, float):
        result: Any = _number(kind, value)
    else:
        result = kind(str(value)) if kind is not None else str(value)  # type: ignore[operator]
    if action.choices is not None and result not in action.choices:
        shown = ", ".join(str(c) for c in action.choices if c is not None)
        raise ValueError(f"{result!r} is not one of: {shown}{did_you_mean(str(result), map(str, action.choices))}")
    return result


def _number(kind: Any, value: Any) -> int | float:
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expects {_type_name(kind)}, not {value!r}") from None
    if kind is int and not number.is_integer():
        raise ValueError(f"expects a whole number, not {value!r}")
    return kind(number)


def _type_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, "text")
