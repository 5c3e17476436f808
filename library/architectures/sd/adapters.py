"""Names of adapters of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import re

from library.architectures.adapters import AdapterFamily, Evidence, ModelRecord, Shapes
from library.architectures.common.adapter_names import clip_naming, unet_naming

UNET = unet_naming((True, True, True, False), "diffusers")
TEXT_ENCODER = clip_naming(
    "text encoder", "lora_te_", "text_encoder", "clip_l", below=("cond_stage_model.transformer.", "text_encoder.")
)
_TEXT_ENCODER_2 = clip_naming(
    "text encoder", "lora_te_", "text_encoder", "clip_h", below=("text_encoder.",), openclip="cond_stage_model.model.",
    unused_layers=1,
)  # fmt: skip
#: the U-Net has transformers at its first level, which SDXL's has not
_FIRST_LEVEL = re.compile(r"down_blocks_0_attentions|input_blocks_[12]_1_|output_blocks_(9|10|11)_|up_blocks_3_")


def _is_sd2(found: Evidence) -> bool:
    wide = 1024 in found.attention_widths | found.text_widths
    named_v2 = "stable-diffusion-v2" in found.recorded or found.recorded.strip().startswith("sd_v2")
    return wide or found.metadata.get("ss_v2") == "True" or "_clip_h_" in found.text or named_v2


def _is_sd1(found: Evidence) -> bool:
    named = _FIRST_LEVEL.search(found.text) or "lora_te_" in found.text or 768 in found.attention_widths
    return bool(named) or "sd_v1" in found.recorded or "stable-diffusion-v1" in found.recorded


def _has_linear_projections(shapes: Shapes) -> bool:
    """Whether the projections around the U-Net's transformers are linear; in 1.x they are 1x1 convolutions."""
    return any(name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())


def _record(version: str, v2: bool, architecture: str, size: int, prediction: str) -> ModelRecord:
    return ModelRecord(version, v2, architecture, "diffusers", f"{size}x{size}", prediction)


ADAPTERS = (
    AdapterFamily(
        "sd2",
        "Stable Diffusion 2.x",
        (UNET, _TEXT_ENCODER_2),
        _is_sd2,
        (
            _record("sd_v2_v", True, "stable-diffusion-v2-768-v", 768, "v"),
            _record("sd_v2", True, "stable-diffusion-v2-512", 512, "epsilon"),
        ),
        "networks.lora",
        fits=_has_linear_projections,
    ),
    AdapterFamily(
        "sd",
        "Stable Diffusion 1.x",
        (UNET, TEXT_ENCODER),
        _is_sd1,
        (
            _record("sd_v1", False, "stable-diffusion-v1", 512, "epsilon"),
            _record("sd_v1_v", False, "stable-diffusion-v1", 512, "v"),
        ),
        "networks.lora",
        fits=lambda shapes: not _has_linear_projections(shapes),
    ),
)
