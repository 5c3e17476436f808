"""Store frozen weights in 8 bits (``--fp8_base``, ``--fp8_base_unet``): e4m3 numbers with a scale for each output
channel.

The format (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433) has 3 bits of mantissa and
reaches from 2^-9 to 448. Weights of a few hundredths would fall into the range where it has few numbers, so each row of
a weight is first divided by s = max|row| / 448. The relative error is then that of the mantissa, at most 2^-4, for all
but the row's smallest numbers.

Weights are dequantized for each product and freed at once. The backward pass dequantizes them again; autograd would
keep a full-size copy of every layer's weight until then.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(FORMAT).max


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (out, ...) as e4m3 numbers of its shape, and float32 scales (out, 1, ...).

    Weights that are e4m3 numbers already, from fp8 files, are unchanged.
    """
    exact = weight.float()
    plain = exact.to(FORMAT)
    if torch.equal(plain.float(), exact):
        return plain, torch.ones_like(exact[(slice(None), *(slice(1),) * (exact.dim() - 1))])
    scale = exact.abs().amax(dim=tuple(range(1, exact.dim())), keepdim=True) / _LARGEST
    # a row of zeros stays one
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (exact / scale).clamp_(-_LARGEST, _LARGEST).to(FORMAT), scale


def dequantise(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of numbers and scales; multiplied in float32, because scales may be too small for float16."""
    return (numbers.float() * scale).to(dtype)


class _Frozen(nn.Module):
    """The common part of fp8 layers: ``weight`` is computed when it is read, and cannot be written."""

    numbers: Tensor  # (out, ...) e4m3
    scale: Tensor  # (out, 1, ...) float32
    weight_dtype: torch.dtype  # of ``weight``

    def take(self, device: torch.device) -> None:
        """Replace the weight by its fp8 form, made on ``device``."""
        weight = self._parameters.pop("weight").detach()
        numbers, scale = quantise(weight.to(device))
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.weight_dtype = weight.dtype

    @property
    def weight(self) -> Tensor:
        return dequantise(self.numbers, self.scale, self.weight_dtype)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return input and bias in the dtype of the product: autocast's within autocast, else the input's."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.to(dtype), None if self.bias is None else self.bias.to(dtype)


class ScaledFp8Linear(_Frozen, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._inputs(x)
        return _Linear.apply(x, self.numbers, self.scale, bias)


class ScaledFp8Conv2d(_Frozen, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x, bias = self._inputs(x)
        return _Conv2d.apply(x, self.numbers, self.scale, bias, self.stride, self.padding, self.dilation, self.groups)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        return F.linear(x, dequantise(numbers, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        numbers, scale = ctx.saved_tensors
        return gradient @ dequantise(numbers, scale, gradient.dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, dequantise(numbers, scale, x.dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        numbers, scale = ctx.saved_tensors
        weight = dequantise(numbers, scale, gradient.dtype)
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *[None] * 7


def store_in_fp8(model: nn.Module, device: torch.device, home: torch.device | str | None = None) -> nn.Module:
    """Store the weights of a frozen model's blocks in fp8, in place, and move the model to ``home``.

    Layers are converted one by one, so at most the largest one is on the device at full size. Layers outside the
    repeated blocks (the first and last layers, time embeddings) are few and sensitive, and keep their dtype.

    Args:
        device: where the numbers are computed.
        home: the same, if not given.
    """
    for path, module in model.named_modules():
        kind = {nn.Linear: ScaledFp8Linear, nn.Conv2d: ScaledFp8Conv2d}.get(type(module))
        repeated = any(name.isdigit() for name in path.split("."))
        plain = getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(
            getattr(module, "padding", 0), str
        )
        if kind is not None and repeated and plain:
            # the instance stays the same object, because other modules refer to it
            module.__class__ = kind
            module.take(device)
            if home is not None:
                module.to(home)
    return model.to(device if home is None else home)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
