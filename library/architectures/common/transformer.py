"""Small parts that the transformers of several families share.

Shape legend: B batch, N tokens, D features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10_000.0
#: of the norms, where a family has no other
NORM_EPS = 1e-6


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width) float32: cosines, then sines, of falling frequencies (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * powers)  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467), eq. 4, over the last axis.

    Args:
        parameter: its parameter's name in published files.
    """

    def __init__(self, width: int, *, eps: float = NORM_EPS, parameter: str = "weight") -> None:
        super().__init__()
        self.eps = eps
        self.parameter = parameter
        self.register_parameter(parameter, nn.Parameter(torch.ones(width)))

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.parameter)
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)
