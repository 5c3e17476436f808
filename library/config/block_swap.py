"""What ``--blocks_to_swap`` implies and excludes, for every family that has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from library.config.declaration import Finding, Implied, error

_ONE_OF_THEM = "remove one of them"


def misfits(o: Any, count: int) -> Iterator[Finding]:
    """Yield what blocks in host memory do not go with.

    Args:
        o: all options.
        count: blocks that wait there; 0 or None for none.
    """
    if not count:
        return
    if "full" in o.groups():
        yield error(
            "--blocks_to_swap: only with adapters so far, whose model is frozen; to train the whole model, use "
            "--gradient_checkpointing and a fused update"
        )
    if o.training.cpu_offload_checkpointing:
        yield error(f"--blocks_to_swap: not with --cpu_offload_checkpointing; {_ONE_OF_THEM}")
    if o.training.torch_compile:
        yield error(
            f"--blocks_to_swap: not with --torch_compile, whose blocks must stay where they are; {_ONE_OF_THEM}"
        )


def checkpointing(count: int) -> Implied | None:
    """Return that gradient checkpointing is on, where blocks are swapped."""
    return Implied(True, "follows from --blocks_to_swap") if count else None
