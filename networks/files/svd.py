"""The best low-rank forms of a change, and how many ranks they need.

By Eckart and Young 1936 the first r singular triplets are nearest to a matrix among all of rank r. Where the matrix is
a product of thin factors, U D, its decomposition is that of a small one: with U = Q_u R_u and D^T = Q_d R_d, R_u R_d^T
is (r, r), so that nothing of the size of the weight is ever decomposed.
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
        """(up (out, rank), down (rank, in)) of the first ranks: up holds the values."""
        return (self.left[:, :rank] * self.values[:rank]).contiguous(), self.right[:rank].contiguous()

    def lost(self, rank: int) -> float:
        """Frobenius norm of what the first ranks leave out, as a share of the whole."""
        squares = self.values.double().square()
        whole = float(squares.sum())
        return (float(squares[rank:].sum()) / whole) ** 0.5 if whole else 0.0


def decompose(change: Tensor) -> Decomposed:
    """Of a matrix (out, in)."""
    return Decomposed(*torch.linalg.svd(change, full_matrices=False))


def decompose_product(up: Tensor, down: Tensor) -> Decomposed:
    """Of ``up (out, r) @ down (r, in)``, without making the product where r is the smaller."""
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return decompose(up @ down)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    inner = decompose(r_up @ r_down.T)
    return Decomposed(q_up @ inner.left, inner.values, inner.right @ q_down.T)


def low_rank(change: Tensor, rank: int, *, clamp_quantile: float = 1.0) -> tuple[Tensor, Tensor]:
    """``up (out, rank) @ down (rank, in)``, nearest to ``change`` (out, in) among all matrices of that rank.

    Args:
        change: float32, on the device to compute on.
        rank: cut to the smaller side of ``change``.
        clamp_quantile: see ``clamped``.
    """
    return clamped(*decompose(change).factors(rank), clamp_quantile)


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Numbers beyond plus or minus this quantile of all numbers of both cut to it; 1 cuts none.

    A few of them may be far larger than the others and do harm in low precision.
    """
    if quantile < 1:
        # torch's own quantile takes no more than 2^24 numbers
        numbers = torch.cat([up.flatten(), down.flatten()]).cpu().numpy()
        limit = float(np.quantile(numbers, quantile))
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return up, down


# ---- how many ranks ----

#: largest singular value of a module that changes nothing
_NOTHING = 1e-6

RankOf = Callable[[Tensor], int]


def fixed(rank: int) -> RankOf:
    """That rank for every module, or all its ranks."""
    return lambda values: max(1, min(rank, len(values)))


def dynamic(method: str, parameter: float, most: int) -> RankOf:
    """The rank of each module by its singular values, in falling order.

    One more rank than the method asks for is kept, as published.

    Args:
        method: ``sv_ratio``: values above the first over ``parameter``; ``sv_cumulative``: until their sum is the share
            ``parameter`` of all; ``sv_fro``: until their norm is.
        most: the largest rank.

    Raises:
        UserError: an unknown method, or a parameter that cannot be.
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
    """How many parts, from the first, make up the share of all."""
    reached = torch.cumsum(parts, 0) / parts.sum()
    return int(torch.searchsorted(reached, share)) + 1


_NEEDED: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": lambda values, ratio: int((values > values[0] / ratio).sum()),
    "sv_cumulative": _until,
    "sv_fro": lambda values, share: _until(values.square(), share**2),
}
DYNAMIC_METHODS = tuple(_NEEDED)
