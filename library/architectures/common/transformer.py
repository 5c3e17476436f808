"""Small parts that the transformers of several families share.

Shape legend: B batch, N tokens, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PERIOD = 10_000.0


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width) float32: cosines, then sines, of falling frequencies (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * powers)  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
