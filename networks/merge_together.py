"""Several networks merged into one model for good, as ``--base_weights`` and ``gen_img.py --network_merge`` ask."""

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
    """Change the models as the networks do when they are applied together; none is applied before or after.

    What a DoRA or an OFT changes depends on the weight that it is put on. So all of ours see the weights as they are
    now; one after the other, the second would see what the first has made. Networks of third parties have no other way
    than theirs, and follow in their order.

    Args:
        text_encoder: as ``networks.third_party.text_argument`` gives it.
        dtype: of the changed weights.
        device: where sums are made.
    """
    ours: list[AdapterModule] = []
    for merged in networks:
        if isinstance(merged.network, AdapterNetwork):
            ours += merged.network.adapters_to_merge(text_encoder, merged.denoiser, merged.weights)
    merge_all_forever(ours, device, dtype)
    for merged in networks:
        if not isinstance(merged.network, AdapterNetwork):
            merged.network.merge_to(text_encoder, merged.denoiser, merged.weights, dtype, device)
