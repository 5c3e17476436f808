"""Steps of transformer blocks in few kernels, with gradients that keep little for the backward pass.

Spelled out in torch's operators, each of them is up to twenty small kernels, or keeps several copies of the tokens.
Within ``torch.compile`` the plain formulas are used, because the compiler fuses them itself.

Shape legend: B batch, L tokens, H heads, d features of a head, D features of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own (Peebles & Xie 2023, "adaLN", arXiv:2212.09748).

    Args:
        x: (B, L, D).
        shift: (B, 1, D); ``scale`` too.
    """
    if torch.compiler.is_compiling():
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
    if len(x) == 1 and x.dtype == shift.dtype == scale.dtype:
        return _ModulatedNormOfOne.apply(x, shift, scale)
    return _ModulatedNorm.apply(x, shift, scale)


class _ModulatedNormOfOne(torch.autograd.Function):
    """For a batch of one, factor and shift are weight and bias of torch's norm, whose gradients come with the input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        factor, bias = 1 + scale, shift.contiguous()
        width = x.shape[-1:]
        out, mean, rstd = torch.native_layer_norm(x, width, factor.view(width), bias.view(width), NORM_EPS)
        ctx.save_for_backward(x, mean, rstd, factor, bias)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, factor, bias = ctx.saved_tensors
        width, (for_x, for_shift, for_scale) = x.shape[-1:], ctx.needs_input_grad
        of_x, of_scale, of_shift = torch.ops.aten.native_layer_norm_backward(
            gradient, x, width, mean, rstd, factor.view(width), bias.view(width), [for_x, for_scale, for_shift]
        )
        return (
            of_x if for_x else None,
            of_shift.view(bias.shape) if for_shift else None,
            of_scale.view(factor.shape) if for_scale else None,
        )


class _ModulatedNorm(torch.autograd.Function):
    """Keeps the input; the normalized tokens are computed again in the backward pass.

    ``native_layer_norm`` works in the input's dtype with float32 sums, whatever autocast would make of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
        factor = 1 + scale
        ctx.save_for_backward(x, mean, rstd, factor)
        ctx.shift_shape = shift.shape
        return torch.addcmul(shift, normal, factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, factor = ctx.saved_tensors
        of_x = of_shift = of_scale = None
        if ctx.needs_input_grad[0]:
            inner = (gradient * factor).to(x.dtype)
            of_x = torch.ops.aten.native_layer_norm_backward(
                inner, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            of_shift = gradient.sum_to_size(ctx.shift_shape)
        if ctx.needs_input_grad[2]:
            normal = torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)[0]
            of_scale = (gradient * normal).sum_to_size(factor.shape)
        return of_x, of_shift, of_scale


def add_gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """Return x + gate * change: (B, L, D), with a gate (B, 1, D)."""
    if torch.compiler.is_compiling():
        return x + gate * change
    return _AddGated.apply(x, gate, change)


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(gate, change)
        return torch.addcmul(x, gate, change)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, change = ctx.saved_tensors
        of_gate = (gradient * change).sum_to_size(gate.shape) if ctx.needs_input_grad[1] else None
        return gradient, of_gate, gradient * gate if ctx.needs_input_grad[2] else None


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs of features (B, L, H, d) by cosines and sines that broadcast to (B, L, H, d/2)."""
    cos, sin = turn
    if torch.compiler.is_compiling():
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, d/2) each
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Return x turned by the angles, or by their negatives; computed in float32, rounded once."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, H, d/2) each
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = out.unflatten(-1, (-1, 2)).unbind(-1)
    torch.addcmul(even * cos, odd, sin, value=-direction, out=first)
    torch.addcmul(odd * cos, even, sin, value=direction, out=second)
    return out
