"""How a rule is declared that says when options have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from library.config.arguments import TrainNetworkOptions


@dataclass(frozen=True)
class IdleRule:
    """Options that change nothing in runs for which ``applies`` holds."""

    names: tuple[str, ...]
    reason: str  # completes "--dynamo_backend has no effect ..."; shown in messages and in docs/options/
    applies: Callable[[TrainNetworkOptions], object]  # its truth counts


def idle(*names: str, reason: str) -> Callable[[Callable[[TrainNetworkOptions], object]], IdleRule]:
    """Make a function of the options the condition under which ``names`` have no effect.

    An option at its default is never reported, so the condition need not look at the options themselves.
    """
    return lambda applies: IdleRule(names, reason, applies)


def message(names: Iterable[str], reason: str) -> str:
    """``--a, --b and --c have no effect <reason>``."""
    flags = [f"--{name}" for name in names]
    shown = " and ".join([", ".join(flags[:-1]), flags[-1]] if len(flags) > 1 else flags)
    return f"{shown} {'have' if len(flags) > 1 else 'has'} no effect {reason}"
