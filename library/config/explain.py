"""``--explain``: every option's value, where it comes from, and whether it has an effect."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from library.config.arguments import TrainNetworkOptions
from library.config.core import CORE
from library.config.declaration import Declaration
from library.config.implied import implied
from library.config.no_effect import reasons
from library.launched import is_first_process

#: columns where the output is no terminal
_PLAIN_WIDTH = 160


@dataclass(frozen=True)
class Row:
    """One option."""

    group: str
    name: str
    value: str
    origin: str  # "default", "command line", "run.toml:3", "follows from --x"
    note: str = ""


def explanation(options: TrainNetworkOptions, origins: Mapping[str, str], own: Declaration) -> list[Row]:
    """A row for every option, in the order of ``--help``; secrets are masked.

    Args:
        origins: where given options come from; options that differ from their default and are not in it were
            set by a program.
    """
    following = implied(options)
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
    options: TrainNetworkOptions,
    origins: Mapping[str, str],
    own: Declaration,
    *,
    file: TextIO | None = None,
) -> None:
    """One table with a section for each group; given options stand out on a terminal. One process prints."""
    if not is_first_process():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = file or sys.stdout
    width = shutil.get_terminal_size().columns if file.isatty() else _PLAIN_WIDTH
    table = Table(title="options", title_justify="left")
    table.add_column("option", no_wrap=True)
    for title in ("value", "from", "note"):
        table.add_column(title, overflow="fold")
    group = ""
    for row in explanation(options, origins, own):
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(Text(group, style="bold"))
        style = "dim" if row.origin == "default" else ""
        # as Text, or rich would take [brackets] in values for its markup
        cells = (f"  --{row.name}", row.value, row.origin, row.note)
        table.add_row(*(Text(cell, style=style) for cell in cells))
    console = Console(file=file, width=width)
    console.print(table)
    if options.dataset.dataset_config is not None:
        console.print(Text(f"keys of {options.dataset.dataset_config} win over the data options above"))
