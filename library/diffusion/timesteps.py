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
