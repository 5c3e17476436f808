"""Find options that have no effect in a run, before anything is loaded, and report them with the reason.

A rule is a function of the options, declared with ``idle`` beside its options; ``library/data/idle_options.py`` finds
those that depend on the dataset file, ``library/training/idle_options.py`` on the length of the run, ``library/optim/``
on optimizer and schedule. They warn, and ``--strict`` makes the warnings errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from library.config.arguments import RunOptions, flat
from library.config.core import CORE
from library.config.declaration import Declaration, IdleRule, message
from library.errors import Doubtful, NoEffect, UserError

logger = logging.getLogger(__name__)


def given(options: RunOptions) -> set[str]:
    """Return the names of meaningful options: neither at their default, nor at values that programs always write."""
    anyway = written_anyway(options)
    return {f.name for f, value in flat(options) if value != f.default and value not in anyway.get(f.name, ())}


def written_anyway(options: RunOptions) -> dict[str, tuple[Any, ...]]:
    """Return values that graphical programs write for options that their users did not set."""
    prompts = (Path(options.output.output_dir or "") / "sample" / "prompt.txt",)
    return {
        "sample_sampler": ("euler_a", "euler"),
        "sample_prompts": (*map(str, prompts), *(path.as_posix() for path in prompts)),
        "wandb_run_name": (options.output.output_name or "last",),
        "max_bucket_reso": (2048,),
        "save_every_n_epochs": (1,),
        "learning_rate": (getattr(options.optimizer, "unet_lr", None),),
    }


def _applying(options: RunOptions, own: Declaration) -> Iterator[IdleRule]:
    # the caching tools have the families' options in another group, and report irrelevant ones themselves
    rules = own.idle if set(own.groups) <= set(options.groups()) else ()
    yield from (rule for rule in (*CORE.idle, *rules) if rule.applies(options))


def idle_names(options: RunOptions, own: Declaration) -> set[str]:
    """Return the names of all options without effect in this run, given or not."""
    return {name for rule in _applying(options, own) for name in rule.names} | own.unused.keys()


def reasons(options: RunOptions, own: Declaration) -> list[tuple[list[str], str]]:
    """Return given options without effect and why, as far as the options alone show it.

    Args:
        own: what the family and the kind declare.
    """
    changed = given(options)
    # where an option is never used, that is the only reason that helps
    never = [([name], why) for name, why in own.unused.items() if name in changed]
    left = changed - own.unused.keys()
    found = (([n for n in rule.names if n in left], rule.reason) for rule in _applying(options, own))
    return [*((names, reason) for names, reason in found if names), *never]


def without_effect(options: RunOptions, own: Declaration) -> list[NoEffect]:
    """Return one warning for each rule that applies."""
    return [NoEffect(message(names, reason)) for names, reason in reasons(options, own)]


def report(warnings: Iterable[str], *, strict: bool) -> None:
    """Log warnings; under ``--strict`` those on options without effect, and other doubtful ones, are errors.

    Raises:
        UserError: one line for each.
    """
    warnings = list(warnings)
    if strict and (idle := as_errors(warnings)):
        raise UserError("\n".join(idle))
    for warning in warnings:
        logger.warning("%s", warning)


def as_errors(warnings: Iterable[str]) -> list[str]:
    """Return the error lines of ``--strict``."""
    remedies = ((w, "; remove it" if isinstance(w, NoEffect) else "") for w in warnings if isinstance(w, Doubtful))
    return [f"{warning}{remedy} (an error by --strict)" for warning, remedy in remedies]
