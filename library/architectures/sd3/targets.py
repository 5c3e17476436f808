"""The modules of Stable Diffusion 3 and its text encoders that get adapters, and their names in files."""

from __future__ import annotations

from torch import nn

from library.architectures.common.latent_diffusion import CLIP_MODULES
from library.architectures.lora_target import LoraTarget

T5_MODULES = ("T5Attention", "T5DenseGatedActDense")

#: the layers outside of the blocks, in the order of the network arg ``emb_dims``
EMBEDDERS = (
    "context_embedder",
    "t_embedder",
    "x_embedder",
    "y_embedder",
    "final_layer.adaLN_modulation",
    "final_layer.linear",
)


def stacked_widths(path: str, layer: nn.Module) -> tuple[int, ...]:
    """Return the output features of query, key and value, which are stacked in ``qkv``."""
    return (layer.weight.shape[0] // 3,) * 3 if path.rpartition(".")[2] == "qkv" else ()


CLIP_L = LoraTarget("lora_te1", CLIP_MODULES, diffusers_root="text_encoder")
CLIP_G = LoraTarget("lora_te2", CLIP_MODULES, diffusers_root="text_encoder_2")
T5XXL = LoraTarget("lora_te3", T5_MODULES, diffusers_root="text_encoder_3")
DENOISER = LoraTarget(
    "lora_unet",
    ("SingleDiTBlock",),
    diffusers_root="transformer",
    attention_classes=("SelfAttention",),
    stacked_widths=stacked_widths,
    network_modules=("networks.lora_sd3",),
)


def text_encoder_target(encoder: nn.Module) -> LoraTarget:
    """Return the target of a text encoder that no family has loaded; CLIP-G is wider than CLIP-L."""
    if type(encoder).__name__.startswith("T5"):
        return T5XXL
    return CLIP_G if encoder.config.hidden_act == "gelu" else CLIP_L
