"""Numbering of the 25 blocks of an SD 1.x/2.x U-Net, for block-wise ranks and learning rates.

The numbers follow the original layout: input blocks 0-11 (0 is the first convolution; 3, 6 and 9 are the
downsamplers), the middle block 12, output blocks 0-11 as 13-24 (an upsampler belongs to the block it ends).
"""

from __future__ import annotations

import re

DOWN_BLOCKS = 12
UP_BLOCKS = 12
MID_BLOCK = DOWN_BLOCKS
NUM_BLOCKS = DOWN_BLOCKS + 1 + UP_BLOCKS

_LEVEL_SIZE = 3  # input or output blocks per resolution level
_DOWN = re.compile(r"down_blocks\.(\d+)\.(attentions|resnets|downsamplers)\.(\d+)\.")
_UP = re.compile(r"up_blocks\.(\d+)\.(attentions|resnets|upsamplers)\.(\d+)\.")


def unet_block_index(path: str) -> int:
    """Block number, 0-24, of a module by its dotted path in diffusers' ``UNet2DConditionModel``.

    Raises:
        ValueError: the path is in none of the blocks.
    """
    if path.startswith("mid_block."):
        return MID_BLOCK
    if found := _DOWN.match(path):
        level, kind, place = int(found[1]), found[2], int(found[3])
        # a level's downsampler is the input block after its two ResNets
        place_in_level = _LEVEL_SIZE - 1 if kind == "downsamplers" else place
        return 1 + _LEVEL_SIZE * level + place_in_level
    if found := _UP.match(path):
        level, kind, place = int(found[1]), found[2], int(found[3])
        place_in_level = _LEVEL_SIZE - 1 if kind == "upsamplers" else place
        return MID_BLOCK + 1 + _LEVEL_SIZE * level + place_in_level
    raise ValueError(f"{path} is in none of the U-Net's {NUM_BLOCKS} blocks")
