"""Names of adapters of Stable Diffusion XL."""

from __future__ import annotations

import re

from library.architectures.adapters import AdapterFamily, Evidence, ModelRecord
from library.architectures.common.adapter_names import clip_naming, unet_naming

UNET = unet_naming((False, True, True), "original", addition_embed_type="text_time")
TEXT_ENCODER_1 = clip_naming(
    "text encoder 1", "lora_te1_", "text_encoder", "clip_l",
    below=("conditioner.embedders.0.transformer.", "text_encoder."),
)  # fmt: skip
TEXT_ENCODER_2 = clip_naming(
    "text encoder 2", "lora_te2_", "text_encoder_2", "clip_g", below=("text_encoder_2.",),
    openclip="conditioner.embedders.1.model.",
)  # fmt: skip

#: blocks that have transformers in Stable Diffusion 1.x and 2.x alone
_NOT_HERE = re.compile(r"down_blocks_0_attentions|input_blocks_[12]_1_|output_blocks_(9|10|11)_|up_blocks_3_")
_NAMES = re.compile(
    r"lora_te[12]_|text_encoder_2_|_clip_g_|transformer_blocks_[1-9]|label_emb|add_embedding"
    r"|(lora|oft)_unet_(input_blocks|output_blocks|middle_block)_"
)


def _claims(found: Evidence) -> bool:
    if _NOT_HERE.search(found.text):
        return False
    return bool(_NAMES.search(found.text)) or 2048 in found.attention_widths or "xl" in found.recorded


_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"

ADAPTERS = (
    AdapterFamily(
        "sdxl",
        "Stable Diffusion XL",
        (UNET, TEXT_ENCODER_1, TEXT_ENCODER_2),
        _claims,
        tuple(
            ModelRecord(
                "sdxl_base_v1-0", False, "stable-diffusion-xl-v1-base", _IMPLEMENTATION, "1024x1024", prediction
            )
            for prediction in ("epsilon", "v")
        ),
        "networks.lora",
        {
            "lora_te_": "an old DyLoRA has such names, and networks/extract_lora_from_dylora.py makes a LoRA of it",
        },
    ),
)
