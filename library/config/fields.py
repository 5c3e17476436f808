"""Turn dataclass fields into flags: ``option`` declares a field, ``add_flags`` adds it to a parser."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    type: Callable[[str], Any] | None = None,
    choices: Sequence[Any] | None = None,
    nargs: str | int | None = None,
    const: Any = None,
    aliases: Sequence[str] = (),
    secret: bool = False,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    weights: bool = False,
    harmless: bool = False,
    required: bool = False,
    neutral: Sequence[Any] = (),
) -> Any:
    """Declare a field that is a flag of the same name.

    Args:
        default: ``False`` makes a switch.
        help: what it does, with units; the default is added to it.
        type: converter of the text; left out for switches and texts.
        const: the value of an option that is given without one, with ``nargs="?"``.
        secret: whether the value must never be logged or recorded.
        unit: unit of its number, "" for a plain factor; every numeric option of a run has one.
        minimum: least value.
        maximum: largest value.
        above: a value that it must be greater than.
        below: a value that it must be less than.
        weights: whether it names a file or folder of weights; a resumed run must have the same content, not the same
        path.
        harmless: whether a resumed run with another value is still exact.
        required: whether the parser requires it.
        neutral: values that mean the same as leaving the option out, such as 0 for off; programs write them for options
            that are not set. They are accepted beside the choices.
    """
    metadata = {
        "help": help,
        "type": type,
        "choices": choices,
        "nargs": nargs,
        "const": const,
        "aliases": tuple(aliases),
        "secret": secret,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "weights": weights,
        "harmless": harmless,
        "required": required,
        "neutral": tuple(neutral),
    }
    return dataclasses.field(default=default, metadata=metadata)


def with_default(group: type, name: str, default: Any) -> Any:
    """Declare again, in a subclass, the option of a group that differs in its default alone."""
    return dataclasses.field(default=default, metadata=group.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]


def out_of_range(field: dataclasses.Field[Any], value: Any) -> str | None:
    """Return what is wrong with a number, or with one of a list, by the option's limits; None if nothing is."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            wrong = _out_of_range(field, number)
            if wrong is not None:
                return f"--{field.name} {number}: {wrong}"
    return None


def _out_of_range(field: dataclasses.Field[Any], number: float) -> str | None:
    limits = field.metadata
    low, high, above, below = (limits[name] for name in ("minimum", "maximum", "above", "below"))
    if not math.isfinite(number):
        return "must be a finite number"
    if (low is None or number >= low) and (high is None or number <= high):
        if (above is None or number > above) and (below is None or number < below):
            return None
    if low is not None and high is not None:
        return f"must be between {low:g} and {high:g}"
    if above is not None and below is not None:
        return f"must be above {above:g} and below {below:g}"
    or_left_out = ", or left out" if field.default is None else ""
    if low is not None:
        return f"must be at least {low:g}{or_left_out}"
    if high is not None:
        return f"must be at most {high:g}{or_left_out}"
    return f"must be greater than {above:g}" if above is not None else f"must be less than {below:g}"


def normalized(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return an option's value in a run from its parsed value.

    Programs that start the scripts write all of their fields. So an empty text or list, and the option's neutral
    values, mean that an option without a default is not given.
    """
    if isinstance(value, list):
        return [word for word in value if word != ""] or field.default
    if value in field.metadata["neutral"] or (field.default is None and value in ("", Path())):
        return field.default
    return value


class _Choices(list[Any]):
    """The published choices, which are shown; an empty text and neutral values are accepted too."""

    def __init__(self, field: dataclasses.Field[Any]) -> None:
        super().__init__(field.metadata["choices"])
        self._field = field

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) or normalized(self._field, value) == self._field.default


def int_or_float(text: str) -> int | float:
    """Parse steps (``100``) as int, or a fraction of the run (``0.1``, ``10%``, ``1.0``) as float.

    Raises:
        argparse.ArgumentTypeError: neither, or a fraction over 1.
    """
    try:
        if text.endswith("%"):
            value: int | float = float(text[:-1]) / 100
        elif any(mark in text for mark in ".eE"):
            value = float(text)
        else:
            value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write steps (100), or a fraction of the run (0.1 or 10%)"
        ) from None
    if not (0 <= value <= 1 if isinstance(value, float) else value >= 0):  # also refuses "nan"
        raise argparse.ArgumentTypeError(
            f"{text!r}: a fraction of the run lies between 0 and 1; steps are whole numbers"
        )
    return value


def add_flags(
    parser: argparse.ArgumentParser,
    group: type,
    *,
    topic: str = "",
    texts: Mapping[str, str] = MappingProxyType({}),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add one section of flags, titled by the dataclass's docstring.

    Args:
        topic: the word for ``--help TOPIC``.
        texts: help texts of single options instead of their own.
        notes: further notes on them.
    """
    section = parser.add_argument_group((group.__doc__ or group.__name__).splitlines()[0].rstrip("."))
    if topic:
        section.topic = topic  # type: ignore[attr-defined]
    for field in dataclasses.fields(group):
        add_flag(section, field, text=texts.get(field.name), note=notes.get(field.name, ""))


def add_flag(section: Any, field: dataclasses.Field[Any], *, text: str | None = None, note: str = "") -> None:
    """Add one flag from one field."""
    given = field.metadata
    # argparse expands % in help
    help_text = (given["help"] if text is None else text).replace("%", "%%")
    note = f" {note}".rstrip().replace("%", "%%")
    if field.default is False:
        section.add_argument(f"--{field.name}", *given["aliases"], action="store_true", help=help_text + note)
        return
    shown = "" if field.default in (None, "", ()) else f" (default: {field.default})".replace("%", "%%")
    action = section.add_argument(
        f"--{field.name}",
        *given["aliases"],
        type=given["type"] or str,
        default=field.default,
        choices=_Choices(field) if given["choices"] else None,
        nargs=given["nargs"],
        const=given["const"],
        required=given["required"],
        help=help_text + shown + note,
        metavar=_metavar(given["type"], given["choices"]),
    )
    action.secret = given["secret"]  # read where options are written to a file


def _metavar(kind: Callable[[str], Any] | None, choices: Sequence[Any] | None) -> str:
    if choices:
        # None among the published choices means "not given", which cannot be written
        return "{" + ",".join(str(choice) for choice in choices if choice is not None) + "}"
    return {int: "N", float: "X", int_or_float: "N", Path: "PATH"}.get(kind, "TEXT")
