"""One adapted model of a network."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from library.architectures.lora_target import LoraTarget
from networks.adapter_module import AdapterModule


@dataclass
class NetworkPart:
    """One adapted model of a network, and its adapters by dotted module path."""

    label: str  # names the part's parameter groups: "unet", "textencoder"
    model: nn.Module
    target: LoraTarget
    is_text_encoder: bool
    adapters: dict[str, AdapterModule] = field(default_factory=dict)
