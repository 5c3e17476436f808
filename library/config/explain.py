"""``--explain``: every option's value, where it comes from, and whether it has an effect."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from library.config.arguments import RunOptions
from library.config.core import CORE
from library.config.declaration import Declaration
from library.config.implied import implied
from library.config.no_effect import reasons
from library.launched import is_first_process

#: column of the origins, if they fit
_ORIGIN_COLUMN = 44
_INDENT = "    "


@dataclass(frozen=True)
class Row:
    """One option."""

    group: str
    name: str
    value: str
    origin: str  # "default", "command line", "run.toml:3", "follows from --x"
    note: str = ""


def explanation(options: RunOptions, origins: Mapping[str, str], own: Declaration) -> list[Row]:
    """Return a row for every option, in the order of ``--help``; secrets are masked.

    Args:
        origins: origins of given options; options that differ from their default and are not in it were set by a
            program.
    """
    following = implied(options, own)
    notes = {name: f"no effect {reason}" for names, reason in reasons(options, own) for name in names}
    refused = {**CORE.refused, **own.refused}
    rows = []
    for group_name, group in options.groups().items():
        title = (group.__doc__ or group_name).splitlines()[0].rstrip(".")
        for field in dataclasses.fields(group):
            value = getattr(getattr(options, group_name), field.name)
            is_default = value == field.default
            origin = origins.get(field.name, "default" if is_default else "set by a program")
            # an option that was given at its default is given all the same, and still falls back if that is "none"
            if field.name in following and (field.name not in origins or value in (None, "")):
                value, origin = following[field.name].value, following[field.name].origin
            note = notes.get(field.name, "")
            if field.name in refused and not is_default:
                note = f"refused: {refused[field.name]}"
            shown = "(hidden)" if field.metadata["secret"] and value else _shown(value)
            rows.append(Row(title, field.name, shown, origin, note))
    return rows


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(_shown(item) for item in value) or "-"
    return str(value)


def print_explanation(
    options: RunOptions,
    origins: Mapping[str, str],
    own: Declaration,
    *,
    file: TextIO | None = None,
) -> None:
    """One line for each option that was set or follows from others; ``--explain all``: for each option, by group.

    Only one process prints.
    """
    if not is_first_process():
        return
    file = file or sys.stdout
    width = shutil.get_terminal_size().columns
    shows_all = options.config.explain == "all"
    rows = [row for row in explanation(options, origins, own) if row.name != "explain"]
    shown = [row for row in rows if shows_all or row.origin != "default"]
    lines, group = [], ""
    for row in shown:
        if shows_all and row.group != group:
            lines += ["", row.group]
            group = row.group
        lines += _lines(row, width)
    if not shows_all:
        lines += ["", f"{len(rows) - len(shown)} more options are at their defaults: --explain all shows them"]
    if options.dataset.dataset_config is not None:
        lines.append(f"keys of {options.dataset.dataset_config} win over the data options above")
    with contextlib.suppress(BrokenPipeError):  # of a pager that was left before the end
        print("\n".join(lines).lstrip("\n"), file=file, flush=True)


def _lines(row: Row, width: int) -> list[str]:
    """``--name value  (origin)`` in one line, or the origin below it; a note below that."""
    option, origin = f"--{row.name} {row.value}", f"({row.origin})"
    if len(option) + len(origin) + 2 <= width:
        lines = [option.ljust(min(_ORIGIN_COLUMN, width - len(origin) - 2)) + f"  {origin}"]
    else:
        lines = [option, f"    {origin}"]
    # a path that is longer than the line stays whole, so that it can be copied
    return lines + textwrap.wrap(row.note, width, initial_indent=_INDENT, subsequent_indent=_INDENT)
