"""Network args of Lumina-Image 2.0's LoRA."""

from __future__ import annotations

import re

from library.architectures.lora_table import BlockList, LoraTable
from library.architectures.lumina.targets import DENOISER, EMBEDDERS, text_encoder_target

LORA = LoraTable(
    title="Lumina-Image 2.0",
    denoiser=DENOISER,
    encoder_target=text_encoder_target,
    layers={
        "attn_dim": re.compile(r".*\.attention\."),
        "mlp_dim": re.compile(r".*\.feed_forward\."),
        "mod_dim": re.compile(r".*adaLN_modulation\."),
        "refiner_dim": re.compile(r"(noise|context)_refiner\."),
    },
    instead="attn_dim and the like, train_blocks, train_block_indices, network_reg_dims and network_reg_lrs",
    blocks=(
        BlockList("transformer", re.compile(r"layers\.(\d+)\."), "train_block_indices", also=re.compile("final_layer")),
        BlockList("noise_refiner", re.compile(r"noise_refiner\.(\d+)\.")),
        BlockList("context_refiner", re.compile(r"context_refiner\.(\d+)\.")),
    ),
    choice_key="train_blocks",
    choices={
        "transformer": ("transformer",),
        "refiners": ("noise_refiner", "context_refiner"),
        "noise_refiner": ("noise_refiner",),
        "context_refiner": ("context_refiner",),
    },
    embedders_key="embedder_dims",
    embedders=EMBEDDERS,
    perturbs=False,
)
