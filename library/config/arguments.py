"""All options of a run as one frozen object of frozen groups, whose fields are the published flags.

A field's name is the flag's, its default the published one. ``RunOptions.from_args`` turns a parsed
namespace into them; nothing deeper sees the namespace. The groups themselves are in ``library/config/core/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import Self

from library.config.core import CORE
from library.config.core.data import DatasetOptions
from library.config.core.diffusion import LossOptions, NoiseOptions
from library.config.core.model import ModelOptions
from library.config.core.optimizer import OptimizerOptions, SchedulerOptions
from library.config.core.output import OutputOptions, ResumeOptions
from library.config.core.program import ConfigFileOptions, ConsoleOptions
from library.config.core.training import TrainingOptions
from library.config.core.watching import LoggingOptions, ModelSpecOptions, SampleOptions, ValidationOptions
from library.config.declaration import Declaration, joined
from library.config.fields import add_flags, normalized
from library.config.help import HelpAction, marks, split_doc, topic_word
from library.config.parser import SuggestingParser

T = TypeVar("T")


class Options:
    """A frozen dataclass of groups, each a frozen dataclass of options."""

    @classmethod
    def groups(cls) -> dict[str, type]:
        """The dataclass of each attribute."""
        kinds = typing.get_type_hints(cls)
        return {field.name: kinds[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Return the options of a namespace; attributes that are missing take their defaults."""
        return cls(**{name: _group_from_args(group, args) for name, group in cls.groups().items()})


@dataclass(frozen=True)
class RunOptions(Options):
    """The options of every run, by group; kinds of training and model families have further ones."""

    model: ModelOptions
    dataset: DatasetOptions
    output: OutputOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    noise: NoiseOptions
    loss: LossOptions
    sample: SampleOptions
    resume: ResumeOptions
    validation: ValidationOptions
    logging: LoggingOptions
    modelspec: ModelSpecOptions
    console: ConsoleOptions
    config: ConfigFileOptions


def options_of(name: str, groups: Mapping[str, type]) -> type[Any]:
    """A class of options with these groups, in their order."""
    return _options_of(name, tuple(groups.items()))


def options_of_kind(name: str, group: str, own: type, output: type) -> type[Any]:
    """A class of a run's options with the own group of a kind of training after the first, and its output options."""
    (first, *rest) = RunOptions.groups().items()
    return options_of(name, dict([first, (group, own), *rest]) | {"output": output})


@functools.cache
def _options_of(name: str, groups: tuple[tuple[str, type], ...]) -> type[Any]:
    found = dict(groups)
    namespace = {"groups": classmethod(lambda cls: dict(found))}
    return dataclasses.make_dataclass(name, groups, bases=(Options,), namespace=namespace, frozen=True)


def _group_from_args(group: type[T], args: argparse.Namespace) -> T:
    given = vars(args)
    known = [field for field in dataclasses.fields(group) if field.name in given]  # type: ignore[arg-type]
    return group(**{field.name: normalized(field, given[field.name]) for field in known})


def with_groups(kind: type[T], groups: Mapping[str, type]) -> type[T]:
    """The same class of options with further groups after the first one, such as a family's own; always one class."""
    known = kind.groups()  # type: ignore[attr-defined]
    further = tuple((name, group) for name, group in groups.items() if name not in known)
    return _with_groups(kind, further) if further else kind  # type: ignore[arg-type]


@functools.cache
def _with_groups(kind: type[Any], groups: tuple[tuple[str, type], ...]) -> type[Any]:
    (first, *rest) = kind.groups().items()
    joined = dict([first, *groups, *rest])
    return dataclasses.make_dataclass(
        kind.__name__, groups, bases=(kind,), namespace={"groups": classmethod(lambda cls: dict(joined))}, frozen=True
    )


def build_parser(
    groups: Mapping[str, type] | Sequence[type],
    *,
    description: str | None,
    epilog: str | None,
    more: str = "",
    own: Declaration | None = None,
) -> SuggestingParser:
    """A parser with one section for each group; flags may not be shortened.

    Args:
        epilog: an example command.
        more: where to read more.
        own: what becomes of options in this script; the help marks them.
    """
    parser = SuggestingParser(
        usage="%(prog)s [options]",  # argparse's own would name every flag
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.more = more
    parser.add_argument("-h", "--help", action=HelpAction)
    own = joined(CORE, own) if own is not None else Declaration()
    for group in groups.values() if isinstance(groups, Mapping) else groups:
        add_flags(parser, group, topic=topic_word(group, groups), texts=own.texts, notes=marks(own))
    return parser


def script_parser(doc: str | None, options_class: type[RunOptions], own: Declaration) -> SuggestingParser:
    """The parser of a training script.

    Args:
        doc: the script's docstring: what it does, an example command, where to read more.
        own: what the family and the kind declare.
    """
    summary, example, more = split_doc(doc)
    groups = with_groups(options_class, own.groups).groups()
    return build_parser(groups, description=summary, epilog=example, more=more, own=own)


def flat(options: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yield every option's field and value, group by group."""
    for group_field in dataclasses.fields(options):
        group = getattr(options, group_field.name)
        for field in dataclasses.fields(group):
            yield field, getattr(group, field.name)


def without_secrets(options: Any) -> dict[str, Any]:
    """Return option values by name, without tokens and keys; for logs and trackers."""
    return {field.name: value for field, value in flat(options) if not field.metadata["secret"]}


def for_others(options: Any) -> dict[str, Any]:
    """Return option values by name, for trackers that others may see: no secrets, no folders, only names of files."""
    known = without_secrets(options)
    return {name: _without_folder(value) for name, value in known.items() if not name.endswith(("_dir", "_nvme_path"))}


def _without_folder(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folder(entry) for entry in value]
    is_place = isinstance(value, (str, Path)) and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if is_place and value else value


def hide_secrets(options: Any, words: list[str]) -> None:
    """Blot out secrets in a command line; trackers such as wandb record ``sys.argv`` as they find it."""
    for secret in {value for field, value in flat(options) if field.metadata["secret"] and value}:
        words[:] = [word.replace(secret, "***") for word in words]
