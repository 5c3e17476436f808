"""The declaration of an owner of options: the core, a model family, a kind of training, a tool.

Options, their ranges, their rules, and when they have no effect are declared beside the code that they are for. This
module only defines how they are declared and joined; it knows no owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.config.prompt_options import PromptOption


@dataclass(frozen=True)
class Finding:
    """The result of a rule."""

    text: str
    fatal: bool


def error(text: str) -> Finding:
    """Return a finding that ends the run."""
    return Finding(text, fatal=True)


def warning(text: str) -> Finding:
    """Return a finding that is logged."""
    return Finding(text, fatal=False)


@dataclass(frozen=True)
class Facts:
    """The facts that rules may ask about the model family and the kind of training."""

    #: for each text encoder of the model, whether it may be trained with these options
    trained_encoders: tuple[bool, ...] = ()
    #: for each, whether it runs in each step, so that its outputs cannot come from a cache
    live_encoders: tuple[bool, ...] = ()

    @property
    def text_encoders(self) -> int:
        """Return the number of text encoders of the model."""
        return len(self.trained_encoders)


#: (options by group, facts) -> findings; options without effect in the run have their defaults
Rule = Callable[[Any, Facts], Iterator[Finding]]


@dataclass(frozen=True)
class IdleRule:
    """Options without effect in runs for which ``applies`` is true."""

    names: tuple[str, ...]
    reason: str  # completes "--dynamo_backend has no effect ..."; shown in messages and in docs/options/
    applies: Callable[[Any], object]  # its truth counts


def idle(*names: str, reason: str) -> Callable[[Callable[[Any], object]], IdleRule]:
    """Declare a function of the options as the condition under which ``names`` have no effect.

    An option at its default is never reported, so the condition need not look at the options themselves.
    """
    return lambda applies: IdleRule(names, reason, applies)


def message(names: Iterable[str], reason: str) -> str:
    """``--a, --b and --c have no effect <reason>``."""
    flags = [f"--{name}" for name in names]
    shown = " and ".join([", ".join(flags[:-1]), flags[-1]] if len(flags) > 1 else flags)
    return f"{shown} {'have' if len(flags) > 1 else 'has'} no effect {reason}"


@dataclass(frozen=True)
class Implied:
    """The value of an option that is not given, and where it comes from."""

    value: Any  # a text in parentheses if only the run knows it
    origin: str


#: options by group -> what an option that is not given comes to; None if nothing follows
Follow = Callable[[Any], "Implied | None"]


@dataclass(frozen=True)
class Declaration:
    """Everything that one owner declares about options.

    Attributes:
        groups: dataclasses of ``option(...)`` fields, by their name among the groups of all options.
        rules: checks of options together.
        idle: when options have no effect.
        refused: options, its own or those of others, that cannot work with it: name -> why, and what to use instead.
        unused: options of others that change nothing with it: name -> why, completing "--x has no effect ...".
        texts: help texts of others' options in the words of this owner, by name.
        follows: what options that are not given come to, for ``--explain``.
        prompt_options: options within the prompts of its images.
    """

    groups: Mapping[str, type] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    idle: tuple[IdleRule, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    follows: Mapping[str, Follow] = field(default_factory=dict)
    prompt_options: tuple[PromptOption, ...] = ()


def joined(*declarations: Declaration) -> Declaration:
    """Join declarations; for one option or group in two of them, the later counts."""
    return Declaration(
        groups={name: group for d in declarations for name, group in d.groups.items()},
        rules=tuple(rule for d in declarations for rule in d.rules),
        idle=tuple(rule for d in declarations for rule in d.idle),
        refused={name: why for d in declarations for name, why in d.refused.items()},
        unused={name: why for d in declarations for name, why in d.unused.items()},
        texts={name: text for d in declarations for name, text in d.texts.items()},
        follows={name: follow for d in declarations for name, follow in d.follows.items()},
        prompt_options=tuple(option for d in declarations for option in d.prompt_options),
    )
