"""The order of an epoch: which batches make up each step, over all processes and accumulated batches.

The processes share each batch: N of them at batch size B take N x B images of one bucket at a time, or what is left of
it, so that they learn in every step what one process learns at batch size N x B.

A step is made of ``step_size`` such batches, the accumulated ones. Where a bucket has enough images for all of them,
the step takes consecutive images of that bucket; so accumulation, too, learns in such a step what one larger batch
does. Of the batches that are left in each bucket, ``step_size`` of any buckets make a step; only an epoch's last step
may have fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from library.randomness import permutation

T = TypeVar("T")

#: "by batch": all batches shuffled, and dealt to the processes in turn, as older versions of this program did; a run
#: that continues from a state of theirs keeps that order to its end
Order = Literal["by step", "by batch"]


def steps_of_epoch(
    buckets: Iterable[tuple[Sequence[T], bool]], step_size: int, *, seed: int, epoch: int
) -> list[list[T]]:
    """Return the steps of an epoch.

    Args:
        buckets: for each bucket its batches, and whether the last of them is smaller than the others.
        step_size: batches of a step; each is shared by all processes.
        epoch: counted from 0.
    """
    steps: list[list[T]] = []
    rest: list[T] = []
    for batches, last_is_short in buckets:
        whole = len(batches) - (last_is_short and step_size > 1)
        whole -= whole % step_size
        steps += [list(batches[start : start + step_size]) for start in range(0, whole, step_size)]
        rest += batches[whole:]
    rest = [rest[i] for i in permutation(len(rest), seed, "rest of the buckets", epoch)]
    mixed = [rest[start : start + step_size] for start in range(0, len(rest), step_size)]
    last = [mixed.pop()] if mixed and len(mixed[-1]) < step_size else []
    steps += mixed
    return [steps[i] for i in permutation(len(steps), seed, "batches", epoch)] + last


def steps_of_older_states(
    buckets: Iterable[tuple[Sequence[T], bool]],
    world_size: int,
    *,
    seed: int,
    epoch: int,
    again: Callable[[T, int], T],
) -> list[list[T]]:
    """Return the batches of an epoch in the order "by batch", one for each process at a time.

    Args:
        again: makes a batch, and how many times it was used in the epoch, into a further use of its images; such
            batches fill the last round.
    """
    found = [batch for batches, _ in buckets for batch in batches]
    shuffled = [found[i] for i in permutation(len(found), seed, "batches", epoch)]
    for place in range(-len(shuffled) % world_size):
        turn, index = divmod(place, len(found))
        shuffled.append(again(shuffled[index], turn + 1))
    return [shuffled[start : start + world_size] for start in range(0, len(shuffled), world_size)]
