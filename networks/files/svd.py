"""The nearest low-rank approximations of a change, and how many ranks they need.

The first r singular triplets give the nearest matrix of rank r (Eckart and Young 1936). For a product of thin factors,
U D with U = Q_u R_u and D^T = Q_d R_d, only R_u R_d^T (r, r) is decomposed, and no matrix of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError


@dataclass(frozen=True)
class Decomposed:
    """``left (out, n) @ diag(values) @ right (n, in)``, the values in falling order."""

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (up (out, rank), down (rank, in)) of the first ranks; up holds the values."""
        return (self.left[:, :rank] * self.values[:rank]).contiguous(), self.right[:rank].contiguous()

    def lost(self, rank: int) -> float:
        """Return the Frobenius norm of what the first ranks leave out, as a share of the whole."""
        squares = self.values.double().square()
        whole = float(squares.sum())
        return (float(squares[rank:].sum()) / whole) ** 0.5 if whole else 0.0


def decompose(change: Tensor) -> Decomposed:
    """Decompose a matrix (out, in)."""
    return Decomposed(*torch.linalg.svd(change, full_matrices=False))


def decompose_product(up: Tensor, down: Tensor) -> Decomposed:
    """Decompose ``up (out, r) @ down (r, in)``, without the product where r is smaller."""
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return decompose(up @ down)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    inner = decompose(r_up @ r_down.T)
    return Decomposed(q_up @ inner.left, inner.values, inner.right @ q_down.T)


def low_rank(change: Tensor, rank: int, *, clamp_quantile: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return ``up (out, rank) @ down (rank, in)``, the nearest to ``change`` (out, in) among all matrices of that rank.

    Args:
        change: float32, on the device to compute on.
        rank: at most the smaller side of ``change``.
        clamp_quantile: see ``clamped``.
    """
    return clamped(*decompose(change).factors(rank), clamp_quantile)


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return both tensors, clamped to plus or minus this quantile of the values of both; 1 clamps none.

    A few values may be far larger than the others, which does harm in low precision.
    """
    if quantile < 1:
        # torch.quantile takes at most 2^24 values
        numbers = torch.cat([up.flatten(), down.flatten()]).cpu().numpy()
        limit = float(np.quantile(numbers, quantile))
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return up, down


# ---- how many ranks ----

#: largest singular value of a module without effect
_NOTHING = 1e-6

RankOf = Callable[[Tensor], int]


def fixed(rank: int) -> RankOf:
    """Return this rank for every module, or all ranks if it has fewer."""
    return lambda values: max(1, min(rank, len(values)))


def dynamic(method: str, parameter: float, most: int) -> RankOf:
    """Return a function that gives the rank of a module from its singular values, in falling order.

    As in sd-scripts, it keeps one rank more than the method asks for.

    Args:
        method: ``sv_ratio``: values above the first over ``parameter``; ``sv_cumulative``: until their sum is the share
            ``parameter`` of all; ``sv_fro``: the same for their norm.
        most: the largest rank.

    Raises:
        UserError: an unknown method, or an impossible parameter.
    """
    if method not in _NEEDED:
        raise UserError(f"--dynamic_method {method}: choose from {', '.join(_NEEDED)}")
    if method == "sv_ratio" and not parameter >= 1:
        raise UserError(f"--dynamic_param {parameter}: sv_ratio needs a number of at least 1, such as 10")
    if method != "sv_ratio" and not 0 < parameter <= 1:
        raise UserError(f"--dynamic_param {parameter}: {method} needs a share above 0 and up to 1, such as 0.9")
    needed = _NEEDED[method]

    def rank_of(values: Tensor) -> int:
        if len(values) < 2 or float(values[0]) <= _NOTHING:
            return 1
        return min(max(1, min(needed(values.double(), parameter), len(values) - 1)) + 1, most, len(values))

    return rank_of


def _until(parts: Tensor, share: float) -> int:
    """Return how many parts, from the first, make up this share of the sum."""
    reached = torch.cumsum(parts, 0) / parts.sum()
    return int(torch.searchsorted(reached, share)) + 1


_NEEDED: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": lambda values, ratio: int((values > values[0] / ratio).sum()),
    "sv_cumulative": _until,
    "sv_fro": lambda values, share: _until(values.square(), share**2),
}
