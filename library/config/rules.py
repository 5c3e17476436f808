"""Check all options of a run at once, before anything is loaded, by their owners' declarations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from library.config.arguments import flat
from library.config.core import CORE
from library.config.core import data as data_options
from library.config.declaration import Declaration, Facts, Finding, Rule, error, joined
from library.config.fields import out_of_range
from library.config.no_effect import as_errors, idle_names, without_effect
from library.errors import UserError

O = TypeVar("O")

#: rules for checking the data alone, without a model and without training
DATA_RULES: tuple[Rule, ...] = data_options.DECLARATION.rules


class Subject(Protocol):
    """The subject of a run: it declares its own options, and answers the questions of rules."""

    @property
    def declaration(self) -> Declaration: ...

    def facts(self, options: Any) -> Facts: ...


def check(options: Any, subject: Subject, *, rules: Sequence[Rule] | None = None) -> list[str]:
    """Apply every rule of the core and of the subject, or those given, such as ``DATA_RULES``; returns the warnings.

    Raises:
        UserError: all errors, one line each; with ``--strict``, options without effect among them.
    """
    own = joined(CORE, subject.declaration)
    # one line for a refused option, and no other finding
    findings = list(_refused(options, own.refused))
    # an option without effect in the run cannot be wrong
    effective = without(options, {*own.refused, *idle_names(options, subject.declaration)})
    findings += _ranges(effective)
    facts = subject.facts(effective)
    for rule in own.rules if rules is None else rules:
        findings += rule(effective, facts)
    idle = without_effect(options, subject.declaration)
    errors = [finding.text for finding in findings if finding.fatal]
    errors += as_errors(idle) if options.config.strict else []
    if errors:
        raise UserError("\n".join(errors))
    return [*(finding.text for finding in findings), *idle]


def without(options: O, names: Collection[str]) -> O:
    """Return the same with the named options at their defaults."""
    changed = {}
    for group_field in dataclasses.fields(options):  # type: ignore[arg-type]
        group = getattr(options, group_field.name)
        reset = {field.name: field.default for field in dataclasses.fields(group) if field.name in names}
        if reset:
            changed[group_field.name] = dataclasses.replace(group, **reset)
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def _refused(options: Any, table: Mapping[str, str]) -> Iterator[Finding]:
    for field, value in flat(options):
        if field.name in table and value != field.default:
            yield error(f"--{field.name}: {table[field.name]}")


def _ranges(options: Any) -> Iterator[Finding]:
    """Check every number against the limits of its option."""
    for field, value in flat(options):
        if wrong := out_of_range(field, value):
            yield error(wrong)
