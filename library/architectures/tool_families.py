"""The options of all model families on the command line of one tool, where a flag names the family.

torch is not imported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

from library.architectures.registry import FOLDERS, about, declaration
from library.config.fields import option
from library.config.flow import FlowOptions, WeightingOptions
from library.errors import UserError


def family_flags() -> dict[str, str]:
    """Return the folders of the families by their flags in tools, without dashes; "" is the one without a flag."""
    return {about(folder).tool_flag: folder for folder in reversed(FOLDERS)}


@cache
def _own(folder: str) -> dict[str, dataclasses.Field[Any]]:
    groups = declaration(folder).groups.values()
    return {field.name: field for group in groups for field in dataclasses.fields(group)}


def family_switches(what: str) -> list[tuple[str, type, Any]]:
    """Return fields of a dataclass: a switch for each family with a flag.

    Args:
        what: the beginning of their help, such as "the model is".
    """
    flags = family_flags()
    return [(flag, bool, option(False, f"{what} {about(flags[flag]).title}")) for flag in flags if flag]


def _shared(name: str) -> dataclasses.Field[Any]:
    """Return the option as the tools declare it: as published for flow matching, else as the first family has it.

    Where families have different defaults, it has none: each then takes its own.
    """
    published = {f.name: f for group in (FlowOptions, WeightingOptions) for f in dataclasses.fields(group)}
    if name in published:
        return published[name]
    found = [_own(folder)[name] for folder in reversed(FOLDERS) if name in _own(folder)]
    if any(field.default != found[0].default for field in found):
        undecided: Any = dataclasses.field(default=None, metadata=found[0].metadata)
        return undecided
    return found[0]


@cache
def family_options() -> type[Any]:
    """Return a dataclass with the options of every family, each once."""
    names = dict.fromkeys(name for folder in reversed(FOLDERS) for name in _own(folder))
    made: list[tuple[str, Any, Any]] = []
    for name in names:
        shared = _shared(name)
        made.append((name, Any, dataclasses.field(default=shared.default, metadata=shared.metadata)))
    namespace = {"__doc__": "Options of single model families."}
    return dataclasses.make_dataclass("FamilyToolOptions", made, namespace=namespace, frozen=True)


@dataclass(frozen=True)
class Chosen:
    """A tool's family and the values of its own options."""

    folder: str
    options: Any  # of ``family_options()``; options that were not given have the family's own defaults


def chosen_family(switches: Any, given: Any) -> Chosen:
    """Return the family that the switches name.

    Args:
        switches: has an attribute for each flag.
        given: of ``family_options()``.

    Raises:
        UserError: two families, or options of others.
    """
    flags = family_flags()
    chosen = [flag for flag in flags if flag and getattr(switches, flag)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{flag}' for flag in chosen)} exclude each other: give the one that it is")
    folder = flags[chosen[0] if chosen else ""]
    own = _own(folder)
    known = {field.name: field.default for field in dataclasses.fields(given)}
    changed = {name for name, default in known.items() if getattr(given, name) != default}
    if others := sorted(changed - own.keys()):
        homes = [flag for flag, other in flags.items() if flag and others[0] in _own(other)]
        names = ", ".join(f"--{name}" for name in others)
        raise UserError(
            f"{names}: not for {about(folder).title}; remove it, or add {' or '.join(f'--{flag}' for flag in homes)}"
        )
    defaults = {name: own[name].default for name in known.keys() & own.keys() if name not in changed}
    return Chosen(folder, dataclasses.replace(given, **defaults))


def cache_options(*, text: bool) -> frozenset[str]:
    """Return the own options of all families that name their files and, with ``text``, that encoding depends on."""
    found: set[str] = set()
    for folder in FOLDERS:
        found.update(about(folder).model_options, about(folder).text_options if text else ())
    return frozenset(found)
