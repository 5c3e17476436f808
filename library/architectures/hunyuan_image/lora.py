"""Network args of HunyuanImage-2.1's LoRA."""

from __future__ import annotations

import re

from library.architectures.hunyuan_image.targets import DENOISER, text_encoder_target
from library.architectures.lora_table import BlockList, LoraTable

LORA = LoraTable(
    title="HunyuanImage-2.1",
    denoiser=DENOISER,
    encoder_target=text_encoder_target,
    layers={},
    instead="network_reg_dims and network_reg_lrs",
    blocks=tuple(BlockList(kind, re.compile(rf"{kind}_blocks\.(\d+)\.")) for kind in ("double", "single")),
)
