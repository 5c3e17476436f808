"""Find the best low-rank approximation of a weight's change."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def low_rank(change: Tensor, rank: int, *, clamp_quantile: float) -> tuple[Tensor, Tensor]:
    """Return up (out, rank) and down (rank, in), whose product is the nearest to ``change`` (out, in) of that rank.

    By the singular value decomposition (Eckart and Young 1936): up holds the left vectors times the singular values,
    down the right vectors.

    Args:
        change: float32, on the device to compute on.
        rank: cut to the smaller side of ``change``.
        clamp_quantile: values of up and down are clamped to plus or minus this quantile, because a few outliers do harm
            in low precision; 1 clamps none.
    """
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    if clamp_quantile < 1:
        # torch's own quantile takes no more than 2^24 numbers
        numbers = torch.cat([up.flatten(), down.flatten()]).cpu().numpy()
        limit = float(np.quantile(numbers, clamp_quantile))
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return up.contiguous(), down.contiguous()
