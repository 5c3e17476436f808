"""Small forms of frozen weights: 8 or 4 bits for each number, with scales.

========== ==================================================== ==================================================
form       numbers                                              a scale for each
========== ==================================================== ==================================================
fp8        e4m3: 3 bits of mantissa, from 2^-9 to 448           output channel
fp8_scaled the same                                             64 inputs of an output channel
int8       integers from -127 to 127                            output channel
nf4        one of 16 quantiles of the normal distribution       64 numbers
========== ==================================================== ==================================================

e4m3 is that of Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433), NF4 that of Dettmers et
al. 2023, "QLoRA" (arXiv:2305.14314), computed by bitsandbytes. Weights of a few hundredths would fall into the range
where e4m3 has few numbers, so they are first divided by s = max|w| / 448. The relative error is then that of the
mantissa, at most 2^-4, for all but the smallest numbers under a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
#: inputs under one scale of ``fp8_scaled``, and numbers under one of ``nf4``
BLOCK = 64


@dataclass(frozen=True)
class Form:
    """A way of storing the weights (out, ...) of one layer.

    Attributes:
        title: for tables and messages.
        quantise: (weight, scale of the file or None) -> numbers, scales.
        dequantise: (numbers, scales, shape, dtype) -> weight.
    """

    title: str
    quantise: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    dequantise: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


# ---- e4m3 ----


def _rows(weight: Tensor, published: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers in the weight's shape, and float32 scales (out, 1, ...).

    Weights that are e4m3 numbers already, from fp8 files, are unchanged. With the scales that a file has beside its
    numbers, the numbers are those of the file.
    """
    exact = weight.float()
    first = (slice(None), *(slice(1),) * (exact.dim() - 1))  # of each row
    ones = torch.ones_like(exact[first])
    if published is not None and published.numel() in (1, len(exact)):
        scale = published.to(exact).reshape(-1, *(1,) * (exact.dim() - 1)) * ones
        return _divided(exact, scale), scale
    plain = exact.to(FP8)
    if torch.equal(plain.float(), exact):
        return plain, ones
    scale = _whole(exact.abs().amax(dim=tuple(range(1, exact.dim())), keepdim=True) / _LARGEST)
    return _divided(exact, scale), scale


def _blocks(weight: Tensor, published: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers in the weight's shape, and float32 scales (out, in / 64, 1).

    Other weights than those of linear layers with inputs in multiples of 64 have a scale for each output channel.
    """
    if weight.dim() != 2 or weight.shape[1] % BLOCK or published is not None:
        return _rows(weight, published)
    exact = weight.float().unflatten(1, (-1, BLOCK))  # (out, in / 64, 64)
    scale = _whole(exact.abs().amax(dim=2, keepdim=True) / _LARGEST)
    return _divided(exact, scale).flatten(1), scale


def _whole(scale: Tensor) -> Tensor:
    """Return scales with 1 for those of zeros, which stay zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _divided(exact: Tensor, scale: Tensor) -> Tensor:
    return (exact / scale).clamp_(-_LARGEST, _LARGEST).to(FP8)


def _scaled(numbers: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight of numbers and scales. The product is computed in float32, the wider dtype of the two, because
    scales may be too small for float16."""
    weight = numbers.to(dtype)  # exactly: e4m3 numbers and small integers are numbers of every dtype
    if scale.dim() > weight.dim():
        weight.unflatten(1, (scale.shape[1], -1)).mul_(scale)
        return weight
    return weight.mul_(scale)


# ---- integers, and quantiles ----


def _integers(weight: Tensor, published: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 numbers in the weight's shape, and float32 scales (out, 1, ...)."""
    exact = weight.float()
    scale = _whole(exact.abs().amax(dim=tuple(range(1, exact.dim())), keepdim=True) / 127)
    return (exact / scale).round_().to(torch.int8), scale


def _quantiles(weight: Tensor, published: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return two 4-bit numbers in each byte, and the float32 scale of each 64 numbers."""
    from bitsandbytes import functional  # noqa: F401  it registers its operators

    numbers, scale = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    return numbers, scale


def _of_quantiles(numbers: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(numbers, scale, BLOCK, "nf4", list(shape), dtype)


FORMS = {
    "fp8": Form("scaled fp8", _rows, _scaled),
    "fp8_scaled": Form("block-scaled fp8", _blocks, _scaled),
    "int8": Form("int8", _integers, _scaled),
    "nf4": Form("NF4", _quantiles, _of_quantiles),
}
