"""Small parts that the transformers of several families share.

Shape legend: B batch, N tokens, D features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6
MAX_PERIOD = 10_000.0


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width) float32: cosines, then sines, of falling frequencies (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * powers)  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own (Peebles & Xie 2023, "adaLN", arXiv:2212.09748).

    Args:
        x: (B, N, D).
        shift: (B, 1, D); ``scale`` too.
    """
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs of features (B, L, H, d) by cosines and sines that broadcast to (B, L, H, d/2)."""
    cos, sin = turn
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, d/2) each
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
