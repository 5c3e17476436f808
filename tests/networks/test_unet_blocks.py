from __future__ import annotations

import pytest

from networks.unet_blocks import unet_block_index


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("down_blocks.0.attentions.0.proj_in", 1),
        ("down_blocks.0.resnets.1.conv1", 2),
        ("down_blocks.0.downsamplers.0.conv", 3),
        ("down_blocks.2.downsamplers.0.conv", 9),
        ("down_blocks.3.resnets.1.conv2", 11),
        ("mid_block.attentions.0.proj_out", 12),
        ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.0.upsamplers.0.conv", 15),
        ("up_blocks.3.attentions.2.proj_in", 24),
    ],
)
def test_blocks_follow_the_original_numbering(path, block):
    assert unet_block_index(path) == block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("down_blocks.0.resnets.0.conv1", 2),
        ("down_blocks.0.downsamplers.0.conv", 4),
        ("down_blocks.1.attentions.0.proj_in", 5),
        ("down_blocks.2.attentions.1.proj_in", 9),
        ("mid_block.resnets.0.conv1", 10),
        ("mid_block.attentions.0.proj_out", 11),
        ("mid_block.resnets.1.conv1", 12),
        ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.0.upsamplers.0.conv", 15),
        ("up_blocks.2.resnets.2.conv1", 21),
    ],
)
def test_blocks_of_sdxl(path, block):
    from library.architectures.sdxl import SDXL

    blocks = SDXL.denoiser_target.blocks
    assert blocks.count == 23
    assert unet_block_index(path, blocks) == block


def test_other_modules_have_no_block():
    with pytest.raises(ValueError, match="time_embedding"):
        unet_block_index("time_embedding.linear_1")
