"""Write ``docs/options/``: a page for each group of options and each script with further options.

The pages are made from the dataclasses and their rules.

    python -m library.config.document

``tests/config/test_document.py`` fails when the pages are not current.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.config.arguments import RunOptions
from library.config.core import CORE
from library.config.declaration import Declaration, IdleRule
from library.config.fields import int_or_float
from library.config.implied import implied
from library.data.idle_options import NO_REGULARISATION, OPTIONS
from library.optim.schedulers import schedules_that_read
from library.training.idle_options import EPOCHS, EPOCHS_BEFORE_THE_LAST, STEPS

FOLDER = Path(__file__).parents[2] / "docs" / "options"

_MADE = "<!-- made by: python -m library.config.document -->\n"
_INTRODUCTION = """# Options of `train_network.py`

A page for each group. Every option is a flag of the command line and, without its dashes, a key of a `--config_file`
(TOML; tables are only headings, the command line wins). An explanation without tables:
[train_network.md](../train_network.md).

- `--output_config --config_file run.toml` writes the options of a command line to a file, without secrets.
- `--explain` shows the options that were set, and where each value comes from: file and line, command line, another
  option; `--explain all` shows every option.
- `--dry_run` checks options, data, and the headers of images and models, and shows the plan: models, buckets, steps,
  trained parameters, files. No weights are loaded.
- An option that changes nothing in a run is named in a warning; with `--strict` it is an error. The column *has no
  effect* says when that is.
- An empty text (`--vae ""`) leaves an option without a default out, as programs that start the scripts write all of
  their fields. In a file, so do `"None"` and an empty list, for every option; 1 and 0 are true and false for switches.
- A key of a file that is a letter or two away from an option is an error. Keys of known programs and other scripts are
  ignored with one line; a warning names other unknown keys, which are errors with `--strict`.
- Lists that are given twice are joined. Another option that is given twice must have the same value.
- `--help` shows an example and the topics, `--help TOPIC` or `--help OPTION` explains them.

"""


def _modules() -> dict[str, Any]:
    """Return the training scripts, which name what their family and their kind declare."""
    root = FOLDER.parents[1]
    names = [path.stem for path in sorted(root.glob("*.py")) if "script_parser(" in path.read_text(encoding="utf-8")]
    return {name: importlib.import_module(name) for name in names}


def scripts() -> dict[str, Declaration]:
    """Return the family's declaration of each training script."""
    return {name: module.FAMILY for name, module in _modules().items()}


def kinds() -> dict[str, Declaration]:
    """Return the declaration of each kind of training, by the name of its first group."""
    declarations = [module.KIND for module in _modules().values()]
    return {next(iter(kind.groups)): kind for kind in declarations}


def pages(declared: Mapping[str, Declaration] | None = None) -> dict[str, str]:
    """Return every page's text by its file name: one for each group, each kind, and each script with its own options.

    Args:
        declared: families' declarations by script, without ``.py``; those of ``scripts``, if not given.
    """
    groups, of_kinds = CORE.groups, kinds()
    found = scripts() if declared is None else declared
    own = {script: family for script, family in found.items() if family.groups}
    known = {script: _known(module.KIND, module.FAMILY) for script, module in _modules().items()}
    index = _MADE + _INTRODUCTION
    index += _index("", ((_title(g), name, len(dataclasses.fields(g))) for name, g in groups.items()))
    index += _index(
        "Options of one kind of training:", ((_kind_title(kind), name, _count(kind)) for name, kind in of_kinds.items())
    )
    index += _index(
        "Options that only one script has, besides these:",
        ((f"`{script}.py`", script, _count(family)) for script, family in own.items()),
    )
    return (
        {"README.md": index}
        | {f"{name}.md": _page(group) for name, group in groups.items()}
        | {f"{name}.md": _kind_page(kind) for name, kind in of_kinds.items()}
        | {f"{script}.md": _script_page(script, family, known.get(script)) for script, family in own.items()}
    )


def _index(heading: str, rows: Iterable[tuple[str, str, int]]) -> str:
    """Return a table of pages: title, name of the file, number of options."""
    shown = [[f"[{title}]({name}.md)", str(count)] for title, name, count in rows]
    if not shown:
        return ""
    return (f"\n{heading}\n\n" if heading else "") + _table(("page", "options"), shown)


def _count(own: Declaration) -> int:
    return sum(len(_own_fields(name, group)) for name, group in own.groups.items())


def _own_fields(name: str, group: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a group beyond those of the core's group of this name."""
    known = {field.name for field in dataclasses.fields(CORE.groups[name])} if name in CORE.groups else set()
    return [field for field in dataclasses.fields(group) if field.name not in known]


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")


def _page(group: type) -> str:
    return f"{_MADE}# {_title(group)}\n\n{_options(dataclasses.fields(group), CORE.idle)}\n[All options](README.md)\n"


def _kind_title(kind: Declaration) -> str:
    return _title(next(iter(kind.groups.values())))


def _kind_page(kind: Declaration) -> str:
    """Return the page of a kind's own options, and of common options that it refuses or ignores."""
    text = f"{_MADE}# {_kind_title(kind)}\n\n"
    for number, (name, group) in enumerate(kind.groups.items()):
        if fields := _own_fields(name, group):
            text += ("" if number == 0 else f"## {_title(group)}\n\n") + f"{_options(fields, kind.idle)}\n"
    return f"{text}{_others(kind)}[All options](README.md)\n"


def _script_page(script: str, own: Declaration, known: Collection[str] | None) -> str:
    """Return the page of the family's own options, and of common options that it refuses or ignores."""
    text = f"{_MADE}# Options of `{script}.py` alone\n\n"
    for group in own.groups.values():
        text += f"## {_title(group)}\n\n{_options(dataclasses.fields(group), own.idle)}\n"
    return f"{text}{_others(own, known)}[All options](README.md)\n"


def _known(kind: Declaration, own: Declaration) -> set[str]:
    """Return the names of all options of a script."""
    groups = {**CORE.groups, **kind.groups, **own.groups}
    return {field.name for group in groups.values() for field in dataclasses.fields(group)}


def _others(own: Declaration, known: Collection[str] | None = None) -> str:
    """Return the section of options that an owner refuses or ignores.

    Args:
        known: leave out options that are not among these.
    """

    def listed(table: Mapping[str, str], words: str) -> list[list[str]]:
        return [[f"`--{n}`", f"{words}{why}"] for n, why in table.items() if known is None or n in known]

    others = listed(own.refused, "refused: ") + listed(own.unused, "no effect ")
    return f"## Options that are not for this script\n\n{_table(('option', 'why'), others)}\n" if others else ""


def _options(fields: Iterable[dataclasses.Field[Any]], rules: Sequence[IdleRule]) -> str:
    columns = ("option", "type", "default", "unit", "what it does", "has no effect")
    rows = [
        [f"`--{f.name}`", _type(f), _default(f), unit_of(f) or "", _help(f), "; ".join(_idle(f.name, rules))]
        for f in fields
    ]
    return _table(columns, rows)


def unit_of(field: dataclasses.Field[Any]) -> str | None:
    """Return the unit of its number; None if it has none."""
    return field.metadata["unit"]


def is_number(field: dataclasses.Field[Any]) -> bool:
    return field.metadata["type"] in (int, float, int_or_float)


def _type(field: dataclasses.Field[Any]) -> str:
    given = field.metadata
    if field.default is False:
        return "switch"
    if given["choices"]:
        return "one of " + ", ".join(f"`{choice}`" for choice in given["choices"] if choice is not None)
    names = {int: "whole number", float: "number", int_or_float: "number or %", Path: "path"}
    name = names.get(given["type"], "text")
    return f"{name}, several" if given["nargs"] else name


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is False:
        return "off"
    if field.default not in (None, ""):
        return f"`{field.default}`"
    stands_for = implied(_NOTHING_GIVEN, Declaration()).get(field.name)
    return f"{stands_for.value}" if stands_for is not None and stands_for.origin == "default" else ""


_NOTHING_GIVEN = RunOptions(**{name: group() for name, group in RunOptions.groups().items()})


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata["help"]
    return f"{text}. **Refused**: {CORE.refused[field.name]}" if field.name in CORE.refused else text


def _idle(name: str, rules: Sequence[IdleRule]) -> list[str]:
    """Return when the option has no effect."""
    found = [rule.reason for rule in rules if name in rule.names]
    if name in OPTIONS and OPTIONS[name].reason:
        found.append(OPTIONS[name].reason)
    if name == "prior_loss_weight":
        found.append(NO_REGULARISATION)
    if name in (*STEPS, *EPOCHS, *EPOCHS_BEFORE_THE_LAST):
        found.append("in a shorter run")
    if schedules := schedules_that_read(f"--{name}"):
        custom = "without --lr_scheduler_type, " if name == "lr_scheduler_args" else ""
        found.append(f"{custom}with an --lr_scheduler other than {', '.join(schedules)}")
    return found


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"

    columns = list(columns)
    return line(columns) + line(["---"] * len(columns)) + "".join(line(row) for row in rows)


def write(folder: Path = FOLDER) -> None:
    """Write all pages, and remove those of groups that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"{len(pages())} pages written to {FOLDER}")
