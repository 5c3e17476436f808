"""The modules of HunyuanImage-2.1 that carry adapters, and their names in files. Its text encoders carry none."""

from __future__ import annotations

from torch import nn

from library.architectures.hunyuan_image.names import COMFYUI_ENDINGS
from library.architectures.lora_target import LoraTarget


def stacked_widths(path: str, layer: nn.Module) -> tuple[int, ...]:
    """Return the output features of the projections that are stacked in one layer.

    ``img_attn_qkv``, ``txt_attn_qkv``: query, key, value; ``linear1`` of single-stream blocks: these three and the
    first layer of the MLP.
    """
    name = path.rpartition(".")[2]
    rows, columns = layer.weight.shape[:2]
    if name.endswith("_attn_qkv"):
        return (rows // 3,) * 3
    if name == "linear1":
        return (columns,) * 3 + (rows - 3 * columns,)
    return ()


QWEN = LoraTarget("lora_te1", ())
BYT5 = LoraTarget("lora_te2", ())
DENOISER = LoraTarget(
    "lora_unet",
    ("MMDoubleStreamBlock", "MMSingleStreamBlock"),
    diffusers_root="transformer",
    stacked_widths=stacked_widths,
    network_modules=("networks.lora_hunyuan_image",),
    other_endings=tuple(COMFYUI_ENDINGS.items()),
)


def text_encoder_target(encoder: nn.Module) -> LoraTarget:
    """Return the target of a text encoder that no family has loaded."""
    return BYT5 if type(encoder).__name__.startswith("T5") else QWEN
