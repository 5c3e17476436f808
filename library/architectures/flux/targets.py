"""The modules of FLUX.1, Chroma and their text encoders that carry adapters, and their names in files."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from library.architectures.common.latent_diffusion import CLIP_MODULES
from library.architectures.flux import adapters
from library.architectures.flux.names import CHROMA, DEV
from library.architectures.lora_target import LoraTarget

T5_MODULES = ("T5Attention", "T5DenseGatedActDense")

#: the transformer's input layers, in the order of the network arg ``in_dims``
INPUT_LAYERS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")


def stacked_widths(path: str, layer: nn.Module) -> tuple[int, ...]:
    """Return the output features of the projections that are stacked in one layer of the published files.

    ``qkv``: query, key, value; ``linear1`` of single-stream blocks: these three and the MLP's first half.
    """
    name = path.rpartition(".")[2]
    rows, columns = layer.weight.shape[:2]
    if name == "qkv":
        return (rows // 3,) * 3
    if name == "linear1":
        return (columns,) * 3 + (rows - 3 * columns,)
    return ()


CLIP_L = LoraTarget(adapters.CLIP_L.prefix, CLIP_MODULES, diffusers_root=adapters.CLIP_L.diffusers)
T5XXL = LoraTarget(adapters.T5XXL.prefix, T5_MODULES, diffusers_root=adapters.T5XXL.diffusers)
DENOISER = LoraTarget(
    adapters.TRANSFORMER.prefix,
    ("DoubleStreamBlock", "SingleStreamBlock"),
    diffusers_root=adapters.TRANSFORMER.diffusers,
    attention_classes=("SelfAttention",),
    stacked_widths=stacked_widths,
    network_modules=("networks.lora_flux", "networks.oft_flux"),
    namesakes=((adapters.RECORDS[CHROMA].base_version, "Chroma"),),
)
CHROMA_DENOISER = replace(DENOISER, namesakes=((adapters.RECORDS[DEV].base_version, "FLUX.1"),))


def text_encoder_target(encoder: nn.Module) -> LoraTarget:
    """Return the target of a text encoder that no family has loaded."""
    return T5XXL if type(encoder).__name__.startswith("T5") else CLIP_L
