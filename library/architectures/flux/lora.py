"""The network args of FLUX.1's and Chroma's LoRA."""

from __future__ import annotations

import re

from library.architectures.flux.targets import DENOISER, INPUT_LAYERS, T5XXL, text_encoder_target
from library.architectures.lora_table import BlockList, LoraTable

LORA = LoraTable(
    title="FLUX.1",
    denoiser=DENOISER,
    encoder_target=text_encoder_target,
    layers={
        **{
            f"{stream}_{kind}_dim": re.compile(rf"double_blocks\.\d+\.{stream}_{kind}\.")
            for stream in ("img", "txt")
            for kind in ("attn", "mlp", "mod")
        },
        "single_dim": re.compile(r"single_blocks\.\d+\.linear\d"),
        "single_mod_dim": re.compile(r"single_blocks\.\d+\.modulation\."),
    },
    instead="img_attn_dim and the like, train_double_block_indices, network_reg_dims and network_reg_lrs",
    blocks=tuple(
        BlockList(kind, re.compile(rf"{kind}_blocks\.(\d+)\."), f"train_{kind}_block_indices")
        for kind in ("double", "single")
    ),
    choice_key="train_blocks",
    choices={"double": ("double",), "single": ("single",)},
    embedders_key="in_dims",
    embedders=INPUT_LAYERS,
    encoders={"train_t5xxl": T5XXL.prefix},
)
