"""Merge several networks into one model for good, for ``--base_weights`` and ``gen_img.py --network_merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.adapter_module import AdapterModule, merge_all_forever
from networks.base import AdapterNetwork


@dataclass(frozen=True)
class Merged:
    """One network, the weights of its file, and the denoiser as ``networks.third_party.denoiser_argument`` gives it."""

    network: Any
    weights: Mapping[str, Tensor]
    denoiser: nn.Module


def merge_together(
    networks: Sequence[Merged],
    text_encoder: nn.Module | list[nn.Module],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Change the models as if the networks were applied together; none is applied before or after.

    The change of a DoRA or an OFT depends on the base weight. So all of our networks use the present weights; merged
    one after another, the second would use the result of the first. Networks of third parties only have their own
    method; they are merged afterwards, in their order.

    Args:
        text_encoder: as ``networks.third_party.text_argument`` gives it.
        dtype: of the changed weights.
        device: device of the sums.
    """
    ours: list[AdapterModule] = []
    for merged in networks:
        if isinstance(merged.network, AdapterNetwork):
            ours += merged.network.adapters_to_merge(text_encoder, merged.denoiser, merged.weights)
    merge_all_forever(ours, device, dtype)
    for merged in networks:
        if not isinstance(merged.network, AdapterNetwork):
            merged.network.merge_to(text_encoder, merged.denoiser, merged.weights, dtype, device)
