"""Options that have no effect in a run: found before anything is loaded, and named with the reason.

A rule is a function of the options, declared with ``idle`` in the module of its topic; what depends on the dataset file
or on the length of the run is in ``by_dataset`` and ``by_plan``, what depends on optimizer and schedule in
``library/optim/``. They warn, and ``--strict`` makes the warnings errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from library.config.arguments import TrainNetworkOptions, flat
from library.config.no_effect import data, diffusion, network, output, training, watching
from library.config.no_effect.declare import IdleRule, message
from library.errors import Doubtful, NoEffect, UserError

if TYPE_CHECKING:
    from library.architectures.base import Architecture

logger = logging.getLogger(__name__)


def _rules_of(module: ModuleType) -> list[IdleRule]:
    return [rule for rule in vars(module).values() if isinstance(rule, IdleRule)]


RULES: tuple[IdleRule, ...] = tuple(
    rule for module in (data, network, training, diffusion, output, watching) for rule in _rules_of(module)
)


def given(options: TrainNetworkOptions) -> set[str]:
    """Names of the options that say something: neither at their default, nor as programs write them anyway."""
    anyway = written_anyway(options)
    return {f.name for f, value in flat(options) if value != f.default and value not in anyway.get(f.name, ())}


def written_anyway(options: TrainNetworkOptions) -> dict[str, tuple[Any, ...]]:
    """Values that graphical programs write for options that their users left alone: no one asked for them."""
    prompts = (Path(options.output.output_dir or "") / "sample" / "prompt.txt",)
    return {
        "sample_sampler": ("euler_a", "euler"),
        "sample_prompts": (*map(str, prompts), *(path.as_posix() for path in prompts)),
        "wandb_run_name": (options.output.output_name or "last",),
        "max_bucket_reso": (2048,),
        "save_every_n_epochs": (1,),
        "learning_rate": (options.optimizer.unet_lr,),
    }


def reasons(options: TrainNetworkOptions, architecture: Architecture) -> list[tuple[list[str], str]]:
    """Given options without effect and why, as far as the options alone tell."""
    changed = given(options)
    found = []
    # the caching tools have own options of families in another group, and name by themselves what matters not
    own = architecture.idle_rules if set(architecture.option_groups) <= set(options.groups()) else ()
    for rule in (*RULES, *own):
        names = [name for name in rule.names if name in changed]
        if names and rule.applies(options):
            found.append((names, rule.reason))
    found += [([name], why) for name, why in architecture.idle_options.items() if name in changed]
    return found


def without_effect(options: TrainNetworkOptions, architecture: Architecture) -> list[NoEffect]:
    """One warning for each rule that applies."""
    return [NoEffect(message(names, reason)) for names, reason in reasons(options, architecture)]


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
    """The lines of ``--strict``."""
    remedies = ((w, "; remove it" if isinstance(w, NoEffect) else "") for w in warnings if isinstance(w, Doubtful))
    return [f"{warning}{remedy} (an error by --strict)" for warning, remedy in remedies]
