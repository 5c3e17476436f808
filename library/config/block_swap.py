"""The rules and consequences of ``--blocks_to_swap``, for every family that has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from library.config.declaration import Declaration, Facts, Finding, Implied, error
from library.config.fields import option
from library.errors import UserError

O = TypeVar("O")

#: modes of inductor that record CUDA graphs
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def count_option() -> Any:
    """Return the field ``blocks_to_swap`` of a family's options, which joins ``SWAPPING`` to its declaration."""
    return option(
        None,
        "blocks that wait in host memory until they run; turns on gradient checkpointing",
        type=int,
        unit="blocks",
        minimum=0,
        harmless=True,
        neutral=(0,),
    )


def count_of(options: Any) -> int:
    """Return how many blocks wait in host memory; a family with another spelling says it as ``swapped``."""
    groups = (getattr(options, field.name) for field in dataclasses.fields(options))
    counts = (getattr(group, "swapped", None) or getattr(group, "blocks_to_swap", None) for group in groups)
    return next(filter(None, counts), 0)


def swapping(o: Any, facts: Facts) -> Iterator[Finding]:
    """Blocks in host memory exclude some options."""
    if not count_of(o):
        return
    if "full" in o.groups() and not (o.optimizer.fused_backward_pass or o.full.blockwise_fused_optimizers):
        yield error(
            "--blocks_to_swap: trained blocks are updated while they are on the device; add "
            "--blockwise_fused_optimizers or --fused_backward_pass"
        )
    for flag in ("torch_compile", "compile") if "full" in o.groups() else ():
        if getattr(o.training, flag):
            yield error(f"--blocks_to_swap: not with --{flag} where whole models are trained; remove one of them")
    if o.training.compile and o.training.compile_mode in _CUDA_GRAPHS:
        yield error(
            f"--blocks_to_swap: not with --compile_mode {o.training.compile_mode}, whose CUDA graphs need weights that "
            "stay where they are; use max-autotune-no-cudagraphs"
        )


def can_swap(options: Any, facts: Facts) -> bool:
    """Whether blocks could wait in host memory, with the other options as they are."""
    try:
        swapped = with_count(options, 1)
    except UserError:
        return False
    return not any(finding.fatal for finding in swapping(swapped, facts))


def with_count(options: O, count: int) -> O:
    """Return the options with this ``--blocks_to_swap``.

    Raises:
        UserError: the family has no such option.
    """
    for group in dataclasses.fields(options):  # type: ignore[arg-type]
        values = getattr(options, group.name)
        if any(field.name == "blocks_to_swap" for field in dataclasses.fields(values)):
            changed = dataclasses.replace(values, blocks_to_swap=count)
            return dataclasses.replace(options, **{group.name: changed})  # type: ignore[type-var]
    raise UserError(
        "--double_blocks_to_swap, --single_blocks_to_swap: blocks of this model cannot be swapped; remove it"
    )


def is_given(options: Any) -> bool:
    """Whether ``--blocks_to_swap`` is given."""
    groups = (getattr(options, field.name) for field in dataclasses.fields(options))
    return any(getattr(group, "blocks_to_swap", None) for group in groups)


def checkpointing(o: Any) -> Implied | None:
    """Gradient checkpointing is on where blocks are swapped."""
    return Implied(True, "follows from --blocks_to_swap") if count_of(o) else None


SWAPPING = Declaration(rules=(swapping,), follows={"gradient_checkpointing": checkpointing})
