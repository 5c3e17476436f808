"""Network args of Stable Diffusion 3's LoRA."""

from __future__ import annotations

import re

from library.architectures.lora_table import BlockList, LoraTable
from library.architectures.sd3.targets import DENOISER, EMBEDDERS, T5XXL, text_encoder_target

LORA = LoraTable(
    title="Stable Diffusion 3",
    denoiser=DENOISER,
    encoder_target=text_encoder_target,
    layers={
        f"{stream}_{name}_dim": re.compile(rf"joint_blocks\.\d+\.{stream}_block\.{layer}")
        for stream in ("context", "x")
        for name, layer in (("attn", "attn"), ("mlp", "mlp"), ("mod", "adaLN_modulation"))
    },
    instead="x_attn_dim and the like, train_block_indices, network_reg_dims and network_reg_lrs",
    blocks=(BlockList("joint", re.compile(r"joint_blocks\.(\d+)\."), "train_block_indices"),),
    embedders_key="emb_dims",
    embedders=EMBEDDERS,
    encoders={"train_t5xxl": T5XXL.prefix},
    perturbs=False,
)
