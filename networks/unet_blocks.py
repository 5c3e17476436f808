"""Number a U-Net's blocks, for block-wise ranks and learning rates.

The numbers follow the original layout: input blocks (0 is the first convolution; each third one, from 3, is a
downsampler), the middle block, output blocks (an upsampler belongs to the block it ends).

* SD 1.x/2.x, 25 numbers: input blocks 0-11, the middle block 12, output blocks 0-11 as 13-24.
* SDXL, 23 numbers: 0 the time and size embeddings; input blocks 0-8 as 1-9; ResNet, attention and ResNet of the
  middle block as 10-12; output blocks 0-8 as 13-21; 22 the last convolution. Nothing in 0 and 22 carries adapters.
"""

from __future__ import annotations

import re

from library.architectures.lora_target import BlockNumbering
from library.architectures.registry import default_architecture

_NUMBERING = default_architecture().denoiser_target.blocks
assert _NUMBERING is not None
SD_BLOCKS: BlockNumbering = _NUMBERING

_LEVEL_SIZE = 3  # input or output blocks per resolution level
_DOWN = re.compile(r"down_blocks\.(\d+)\.(attentions|resnets|downsamplers)\.(\d+)\.")
_MID = re.compile(r"mid_block\.(attentions|resnets)\.(\d+)\.")
_UP = re.compile(r"up_blocks\.(\d+)\.(attentions|resnets|upsamplers)\.(\d+)\.")


def unet_block_index(path: str, blocks: BlockNumbering = SD_BLOCKS) -> int:
    """Return the number of a module's block by its dotted path in diffusers' ``UNet2DConditionModel``.

    Raises:
        ValueError: the path is in none of the blocks.
    """
    first_mid = blocks.ends + blocks.down
    if found := _MID.match(path):
        # in the order they are computed: ResNet 0, the attention, ResNet 1
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return first_mid + (place if blocks.mid > 1 else 0)
    if found := _DOWN.match(path):
        level, kind, place = int(found[1]), found[2], int(found[3])
        # a level's downsampler is the input block after its two ResNets
        place_in_level = _LEVEL_SIZE - 1 if kind == "downsamplers" else place
        return blocks.ends + 1 + _LEVEL_SIZE * level + place_in_level
    if found := _UP.match(path):
        level, kind, place = int(found[1]), found[2], int(found[3])
        place_in_level = _LEVEL_SIZE - 1 if kind == "upsamplers" else place
        return first_mid + blocks.mid + _LEVEL_SIZE * level + place_in_level
    raise ValueError(f"{path} is in none of the U-Net's {blocks.count} blocks")
