"""Convolutions with frozen half-precision weights on the CPU, as matrix products where images are small.

oneDNN, which computes torch's convolutions on the CPU, needs weights in a blocked layout and copies them into it in
every call, forward and backward. At the lowest levels of a U-Net, with 30 to 60 MB of weights per layer and a few
hundred pixels, that takes longer than the arithmetic. A matrix product of the plain weights with the windows of the
image needs no copy; ``benchmarks/RESULTS.md`` has measurements.

Shape legend: B batch, I input channels, O output channels, h and w of the image; kernels are 3 x 3. Images and weights
are in channels-last memory format, so windows and weights are matrices without a copy.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: up to this many pixels (B*h*w) per output channel a matrix product is faster than a convolution
MOST_PIXELS_PER_CHANNEL = 0.25


class _AsProduct(torch.autograd.Function):
    """The convolution of (B, I, h, w) with (O, I, 3, 3), stride 1, same size, without a gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        with torch.autocast("cpu", enabled=False):
            return _convolved(maps.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast("cpu", enabled=False):
            return _gradient_of_image(gradient, ctx.weight), None, None


def _convolved(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, channels, height, width = maps.shape
    padded = functional.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h+2, w+2, I)
    image, row, column, _ = padded.stride()
    windows = padded.as_strided((batch, height, width, 3, 3, channels), (image, row, column, row, column, 1))
    product = functional.linear(windows.reshape(-1, 9 * channels), _matrix(weight), bias)  # (B*h*w, O)
    return product.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _gradient_of_image(gradient: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = gradient.shape
    of_windows = gradient.permute(0, 2, 3, 1).flatten(0, 2) @ _matrix(weight)  # (B*h*w, 9*I)
    of_windows = of_windows.view(batch, height, width, 3, 3, -1)
    # a pixel is in nine windows, which are summed in float32 and rounded once
    padded = gradient.new_zeros((batch, height + 2, width + 2, weight.shape[1]), dtype=torch.float32)
    for row in range(3):
        for column in range(3):
            padded[:, row : row + height, column : column + width] += of_windows[:, :, :, row, column]
    return padded[:, 1:-1, 1:-1].to(gradient.dtype).permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """Return (O, I, 3, 3) as (O, 9*I), a view in channels-last format."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def convolve_as_products(model: nn.Module) -> None:
    """Replace the 3 x 3 convolutions of ``model`` by matrix products where ``is_quicker`` says so."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
            of_its_kernel = (module.kernel_size, module.padding, module.stride, module.dilation)
            if of_its_kernel == ((3, 3), (1, 1), (1, 1), (1, 1)):
                # not ``forward`` itself, which adapters replace and call
                module._conv_forward = MethodType(_conv_forward, module)


def _conv_forward(self: nn.Conv2d, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_quicker(maps, weight, bias):
        return _AsProduct.apply(maps, weight, bias)
    return nn.Conv2d._conv_forward(self, maps, weight, bias)


def is_quicker(maps: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a matrix product is faster for ``image`` (B, I, h, w) and ``weight`` (O, I, 3, 3)."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    pixels = maps.shape[0] * maps.shape[2:].numel()
    return (
        pixels <= MOST_PIXELS_PER_CHANNEL * weight.shape[0]
        and weight.is_contiguous(memory_format=torch.channels_last)
        and (maps.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not torch.compiler.is_compiling()
    )
