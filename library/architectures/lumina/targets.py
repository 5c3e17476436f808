"""The modules of Lumina-Image 2.0 and Gemma2 that get adapters, and their names in files."""

from __future__ import annotations

from torch import nn

from library.architectures.lora_target import LoraTarget
from library.architectures.lumina import adapters
from library.architectures.lumina.names import QKV, qkv_widths

#: the layers outside of the blocks, in the order of the network arg ``embedder_dims``
EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")


def stacked_widths(path: str, layer: nn.Module) -> tuple[int, ...]:
    """Return the output features of query, key and value, which are stacked in ``qkv``."""
    rows, columns = layer.weight.shape[:2]
    return qkv_widths(columns, rows) if path.endswith(QKV) else ()


GEMMA2 = LoraTarget(adapters.GEMMA2.prefix, ("Gemma2Attention", "Gemma2MLP"), diffusers_root=adapters.GEMMA2.diffusers)
DENOISER = LoraTarget(
    adapters.TRANSFORMER.prefix,
    ("JointTransformerBlock", "FinalLayer"),
    diffusers_root=adapters.TRANSFORMER.diffusers,
    attention_classes=("JointAttention",),
    stacked_widths=stacked_widths,
    network_modules=("networks.lora_lumina",),
)


def text_encoder_target(encoder: nn.Module) -> LoraTarget:
    """Return the target of a text encoder that no family has loaded."""
    return GEMMA2
