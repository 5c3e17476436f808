"""The product of a linear layer with a low-rank adapter, in few kernels.

Shape legend: N tokens of all samples, r rank, in/out features. With y = x W^T + b + s (x D^T) U^T (Hu et al. 2021, eq.
3) and a gradient g of y, that of x is g W + s (g U) D, that of U is s g^T (x D^T), and that of D is s (g U)^T x.

Sums and factors are part of the matrix products. Weights and gradients of the adapter are cast to the dtype of the
product, as autocast does; ``Casts`` casts those of a whole network together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Casts:
    """Copies of the weights of a network in the dtype of its products.

    Cast one by one, the weights of a large model are a thousand small kernels more. Here the first layer of a forward
    pass casts all of them in a few kernels. A copy is freed when the backward pass has used it, so that it makes room for
    the gradient; in a checkpointed block already when its forward pass has, and its second pass casts the weight again:
    so the copies of all blocks are not there at the same time as the activations of one. After any backward pass all
    copies are made anew, because weights may have changed by then, in ways that no counter shows.

    Args:
        weights: returns the network's weights that have copies.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self._weights = weights
        self._copies: dict[int, tuple[Tensor, Tensor, int]] = {}  # weight, its copy, its version
        self._filled = self._outdated = False

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight in a dtype, without gradients."""
        if weight.dtype == dtype:
            return weight
        in_backward = torch._C._current_graph_task_id() != -1
        if self._outdated and not in_backward:
            self._copies.clear()
            self._filled = self._outdated = False
        copy = self._found(weight, dtype)
        if copy is None and not self._filled and weight.requires_grad and not in_backward:
            self._fill(dtype)
            copy = self._found(weight, dtype)
        return weight.detach().to(dtype) if copy is None else copy

    def drop(self, *weights: Tensor) -> None:
        """Free the copies of weights whose gradients are computed."""
        self._outdated = True
        self._free(weights)

    def drop_if_not_saved(self, *weights: Tensor) -> None:
        """Free the copies of weights if the backward pass will not use them: something else is kept in their place."""
        # set within checkpointed blocks, and by whatever else replaces saved tensors
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self._free(weights)

    def _free(self, weights: Iterable[Tensor]) -> None:
        for weight in weights:
            self._copies.pop(id(weight), None)

    def _found(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        known, copy, version = self._copies.get(id(weight), (None, None, 0))
        fits = known is weight and copy is not None and copy.dtype == dtype and version == weight._version
        return copy if fits else None

    @torch.no_grad()
    def _fill(self, dtype: torch.dtype) -> None:
        weights = [w for w in self._weights() if w.requires_grad and w.dtype != dtype]
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        self._filled = True
        self._copies = {id(w): (w, copy, w._version) for w, copy in zip(weights, copies, strict=True)}


class AddLowRank(torch.autograd.Function):
    """Return out + scale * (x D^T) U^T for the output (..., out) of any layer for x (..., in)."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, casts: Casts | None = None
    ) -> Tensor:
        down, up, hidden = _keep(ctx, x, down, up, scale, casts, out.dtype, first=1)
        total = torch.addmm(out.reshape(-1, out.shape[-1]), hidden, up.t(), alpha=scale)
        return total.view(out.shape).to(out.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, hidden = ctx.saved_tensors
        return gradient, *_gradients(ctx, gradient, x, down, up, hidden, None, first=1), None, None


class LinearWithLowRank(torch.autograd.Function):
    """Return the whole sum for a frozen weight (out, in) and bias (out,)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        casts: Casts | None = None,
    ) -> Tensor:
        x = x.to(weight.dtype)
        out = F.linear(x, weight, bias)
        down, up, hidden = _keep(ctx, x, down, up, scale, casts, out.dtype, weight, first=2)
        out.view(-1, out.shape[-1]).addmm_(hidden, up.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, hidden, weight = ctx.saved_tensors
        return None, None, *_gradients(ctx, gradient, x, down, up, hidden, weight, first=2), None, None


def _keep(
    ctx: Any,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    casts: Casts | None,
    dtype: torch.dtype,
    *more: Tensor,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both halves in the dtype of the product, and x D^T (N, r); keep what the backward pass needs.

    ``first`` is the place of x among the inputs.
    """
    ctx.casts, ctx.halves = casts, (down, up) if casts is not None else ()
    x = x.to(dtype)
    down, up = (half.to(dtype) if casts is None else casts.of(half, dtype) for half in (down, up))
    hidden = torch.mm(x.reshape(-1, x.shape[-1]), down.t())
    # a frozen down half needs no input in the backward pass
    ctx.save_for_backward(x if ctx.needs_input_grad[first + 1] else None, down, up, hidden, *more)
    ctx.scale, ctx.shape = scale, x.shape
    if casts is not None:
        casts.drop_if_not_saved(*ctx.halves)
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
    if ctx.casts is not None:
        ctx.casts.drop(*ctx.halves)
    return of_x, of_down, of_up
