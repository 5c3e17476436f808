"""Drawing the timestep at which a sample is trained."""

from __future__ import annotations

import torch


def sample_timestep(generator: torch.Generator, min_timestep: int, max_timestep: int) -> int:
    """A timestep drawn evenly from ``min_timestep`` to ``max_timestep - 1``.

    Raises:
        ValueError: the range is empty.
    """
    if min_timestep >= max_timestep:
        raise ValueError(f"no timestep lies between {min_timestep} and {max_timestep}")
    return int(torch.randint(min_timestep, max_timestep, (1,), generator=generator))


def spread_timesteps(min_timestep: int, max_timestep: int, count: int) -> tuple[int, ...]:
    """The middles of ``count`` equal parts of ``min_timestep`` to ``max_timestep``: the midpoint rule.

    A mean over them stands for the mean over all timesteps that ``sample_timestep`` draws from. Fewer where the range
    has fewer than ``count``.
    """
    part = (max_timestep - min_timestep) / count
    return tuple(sorted({min_timestep + int((index + 0.5) * part) for index in range(count)}))
