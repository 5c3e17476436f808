"""The product of a linear layer with a low-rank adapter, in few kernels.

Shape legend: N tokens of all samples, r rank, in/out features. With y = x W^T + b + s (x D^T) U^T (Hu et al. 2021, eq.
3) and a gradient g of y, that of x is g W + s (g U) D, that of U is s g^T (x D^T), and that of D is s (g U)^T x.

Sums and factors are part of the matrix products. Weights and gradients of the adapter are cast to the dtype of the
product, as autocast does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class AddLowRank(torch.autograd.Function):
    """Return out + scale * (x D^T) U^T for the output (..., out) of any layer for x (..., in)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        down, up, hidden = _keep(ctx, x, down, up, scale, out.dtype)
        total = torch.addmm(out.reshape(-1, out.shape[-1]), hidden, up.t(), alpha=scale)
        return total.view(out.shape).to(out.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, hidden = ctx.saved_tensors
        return gradient, *_gradients(ctx, gradient, x, down, up, hidden, None, first=1), None


class LinearWithLowRank(torch.autograd.Function):
    """Return the whole sum for a frozen weight (out, in) and bias (out,)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        x = x.to(weight.dtype)
        out = F.linear(x, weight, bias)
        down, up, hidden = _keep(ctx, x, down, up, scale, out.dtype, weight)
        out.view(-1, out.shape[-1]).addmm_(hidden, up.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, hidden, weight = ctx.saved_tensors
        return None, None, *_gradients(ctx, gradient, x, down, up, hidden, weight, first=2), None


def _keep(
    ctx: Any, x: Tensor, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype, *more: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both halves in the dtype of the product, and x D^T (N, r); keep what the backward pass needs."""
    x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
    hidden = torch.mm(x.reshape(-1, x.shape[-1]), down.t())
    # a frozen down half needs no input in the backward pass
    ctx.save_for_backward(x if ctx.needs_input_grad[-3] else None, down, up, hidden, *more)
    ctx.scale, ctx.shape = scale, x.shape
    return down, up, hidden


def _gradients(
    ctx: Any,
    gradient: Tensor,
    x: Tensor | None,
    down: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    *,
    first: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, D and U; ``first`` is the place of x among the inputs."""
    needs_x, needs_down, needs_up = ctx.needs_input_grad[first : first + 3]
    rows = gradient.reshape(-1, gradient.shape[-1])  # (N, out)
    of_x = of_down = of_up = None
    if needs_up:
        # beta=0: the first argument gives the shape alone
        of_up = torch.addmm(up, rows.t(), hidden, beta=0, alpha=ctx.scale)
    if needs_x or needs_down:
        inner = torch.addmm(hidden, rows, up, beta=0, alpha=ctx.scale)  # (N, r)
        if needs_down and x is not None:
            of_down = torch.mm(inner.t(), x.reshape(-1, x.shape[-1]))
        if needs_x:
            of_x = torch.mm(inner, down) if weight is None else torch.mm(rows, weight).addmm_(inner, down)
            of_x = of_x.view(ctx.shape)
    return of_x, of_down, of_up
