"""Run a VAE's layers on strips of rows, which needs less memory and gives the same images.

The statistics of group norms are those of the whole image. Only one strip at a time is normalized and convolved, so
that of a ResNet block the input and two outputs are held, and nothing else of the image's size.

Shape legend: B images, C channels, (H, W) features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: (rows of features, with those above and below) -> the same, as a convolution reads them
Prepare = Callable[[Tensor], Tensor]


def slice_vae(vae: nn.Module, slices: int) -> None:
    """Make the blocks of a diffusers VAE work in at most so many strips, fewer in smaller features."""
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.forward = partial(_resnet, module, slices)
        elif type(module).__name__ == "Upsample2D" and getattr(module, "conv", None) is not None:
            module.forward = partial(_upsampled, module, slices)


def _strips(rows: int, slices: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) rows of strips of at least 8 rows."""
    height = max(-(-rows // slices), 8)
    yield from ((start, min(start + height, rows)) for start in range(0, rows, height))


def _resnet(block: Any, slices: int, x: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    hidden = _convolved(x, block.conv1, slices, _normed(block.norm1, x, block.nonlinearity))
    out = _convolved(hidden, block.conv2, slices, _normed(block.norm2, hidden, block.nonlinearity))
    del hidden
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return out.add_(shortcut).div_(block.output_scale_factor)


def _upsampled(block: Any, slices: int, x: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    if output_size is not None:
        return type(block).forward(block, x, output_size, *args, **kwargs)
    batch, _, rows, columns = x.shape
    conv = block.conv
    out = x.new_empty(batch, conv.out_channels, 2 * rows, 2 * columns)
    for first, last in _strips(rows, slices):
        above, below = min(first, 1), min(rows - last, 1)
        part = functional.interpolate(x[:, :, first - above : last + below], scale_factor=2.0, mode="nearest")
        # one of the two rows of each neighbour is read
        part = part[:, :, above : part.shape[2] - below]
        out[:, :, 2 * first : 2 * last] = _conv(part, conv, above=not above, below=not below)
    return out


def _normed(norm: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Prepare:
    """Return the group norm with the statistics of all of ``x``, and the activation behind it."""
    batch, channels = x.shape[:2]
    variance, mean = torch.var_mean(x.reshape(batch, norm.num_groups, -1), dim=2, correction=0)
    per_group = channels // norm.num_groups
    scale = torch.rsqrt(variance.float() + norm.eps).repeat_interleave(per_group, dim=1) * norm.weight.float()
    shift = norm.bias.float() - mean.float().repeat_interleave(per_group, dim=1) * scale

    def prepare(rows: Tensor) -> Tensor:
        return activation((rows.float() * scale[..., None, None] + shift[..., None, None]).to(rows.dtype))

    return prepare


def _convolved(x: Tensor, conv: Any, slices: int, prepare: Prepare) -> Tensor:
    batch, _, rows, columns = x.shape
    out = x.new_empty(batch, conv.out_channels, rows, columns)
    for first, last in _strips(rows, slices):
        above, below = min(first, 1), min(rows - last, 1)
        part = prepare(x[:, :, first - above : last + below])
        out[:, :, first:last] = _conv(part, conv, above=not above, below=not below)
    return out


def _conv(rows: Tensor, conv: Any, *, above: bool, below: bool) -> Tensor:
    """Return a 3x3 convolution of a strip; empty rows are added at the border of the image alone."""
    padded = functional.pad(rows, (1, 1, int(above), int(below)))
    return functional.conv2d(padded, conv.weight, conv.bias)
