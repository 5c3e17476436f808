"""Let tensors lie in memory as a parameter does.

torch's fused updates on the CPU go through the numbers as they lie in memory, and convolutions compute other last bits in
another memory format.
"""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape with the parameter's strides; itself, if it has them."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def view_laid_out_as(parameter: Tensor, flat: Tensor) -> Tensor:
    """Return a view of a flat tensor (N,) with the parameter's shape, and with its strides if it lies without gaps."""
    reached = 1 + sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if reached != flat.numel():
        return flat.view_as(parameter)
    return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
