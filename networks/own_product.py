"""Compute W x of an adapted module, for adapters whose change depends on its weight W: DoRA and OFT."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from networks.adapter_module import AdapterModule, is_method_of


def is_alone(adapter: AdapterModule) -> bool:
    """Whether the hooked forward is the module's own, with its original weight."""
    return is_method_of(adapter._original_forward, adapter.original) and not adapter.has_merged_weight


def own_product(adapter: AdapterModule, out: Tensor, x: Tensor) -> Tensor:
    """Return W x without the bias, from the module's output ``out`` if no other adapter has changed it."""
    if not is_alone(adapter):
        return product(adapter, x)
    bias = adapter.original.bias
    if bias is None:
        return out
    return out - (bias.view(1, -1, 1, 1) if isinstance(adapter.original, nn.Conv2d) else bias)


def product(adapter: AdapterModule, x: Tensor) -> Tensor:
    """Return W x without the bias, with the weight before any merging."""
    layer, weight = adapter.original, adapter.base_weight.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight)
