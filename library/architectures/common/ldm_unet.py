"""The U-Net of Stable Diffusion 1.x, 2.x and XL: names in original (LDM) files and in diffusers, its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from library.architectures.common.expected import check_count
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

LDM_PREFIX = "model.diffusion_model."
HEADS_V1 = 8  # SD 1.x: eight heads at every level
HEAD_WIDTH_V2 = 64  # SD 2.x and SDXL: heads of 64 channels
SIZE_WIDTH = 256  # SDXL: width of the sinusoidal embedding of each number of its size conditioning

#: (LDM, diffusers) names inside a residual block
RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
OUTER = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
#: SDXL's embedding of pooled text and sizes
ADDED = (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"))


def ldm_unet_layout(config: Mapping[str, Any], *, prefix: str = LDM_PREFIX) -> TensorLayout:
    """The LDM layout of a U-Net with this diffusers configuration."""
    return TensorLayout(KeyMap([*OUTER, *encoder_pairs(config), *_decoder_pairs(config)]), prefix)


def _resnet(ldm: str, diffusers: str) -> list[tuple[str, str]]:
    return [(f"{ldm}.{a}", f"{diffusers}.{b}") for a, b in RESNET]


def _levels(config: Mapping[str, Any]) -> tuple[list[bool], int]:
    """Return whether each level has attention, and the layers of a level."""
    return ["CrossAttn" in kind for kind in config["down_block_types"]], int(config["layers_per_block"])


def encoder_pairs(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (LDM, diffusers) names of the way down and the middle, which a ControlNet copies.

    LDM numbers blocks across levels, diffusers within a level. Transformers keep their inner names.
    """
    attention, layers = _levels(config)
    levels = len(attention)
    pairs = list(ADDED if config.get("addition_embed_type") else ())
    for level in range(levels):
        first, block = 1 + level * (layers + 1), f"down_blocks.{level}"
        for layer in range(layers):
            pairs += _resnet(f"input_blocks.{first + layer}.0", f"{block}.resnets.{layer}")
            if attention[level]:
                pairs.append((f"input_blocks.{first + layer}.1", f"{block}.attentions.{layer}"))
        if level < levels - 1:
            pairs.append((f"input_blocks.{first + layers}.0.op", f"{block}.downsamplers.0.conv"))
    pairs += _resnet("middle_block.0", "mid_block.resnets.0")
    pairs.append(("middle_block.1", "mid_block.attentions.0"))
    return pairs + _resnet("middle_block.2", "mid_block.resnets.1")


def _decoder_pairs(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    attention, layers = _levels(config)
    pairs: list[tuple[str, str]] = []
    for step, has_attention in enumerate(reversed(attention)):
        first, block = step * (layers + 1), f"up_blocks.{step}"
        for layer in range(layers + 1):
            pairs += _resnet(f"output_blocks.{first + layer}.0", f"{block}.resnets.{layer}")
            if has_attention:
                pairs.append((f"output_blocks.{first + layer}.1", f"{block}.attentions.{layer}"))
        if step < len(attention) - 1:
            place = 2 if has_attention else 1
            pairs.append((f"output_blocks.{first + layers}.{place}.conv", f"{block}.upsamplers.0.conv"))
    return pairs


def infer_unet_config(shapes: Mapping[str, tuple[int, ...]], *, prefix: str = LDM_PREFIX) -> dict[str, Any]:
    """The diffusers configuration of the U-Net in an LDM file, from names and shapes alone.

    Raises:
        UserError: the names do not add up to a U-Net.
    """
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    channels: list[int] = []
    layers: list[int] = []
    attention: list[bool] = []
    new_level = True
    for index in range(1, 1 + _count(r"input_blocks\.(\d+)\.", shapes)):
        block = f"input_blocks.{index}"
        convolution = shapes.get(f"{block}.0.out_layers.3.weight")
        if convolution is None:  # the downsampling convolution between two levels
            new_level = True
            continue
        if new_level:
            channels.append(convolution[0])
            layers.append(0)
            attention.append(f"{block}.1.norm.weight" in shapes)
            new_level = False
        layers[-1] += 1
    context = next((s[1] for name, s in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    first, last = shapes.get("input_blocks.0.0.weight"), shapes.get("out.2.weight")
    if not channels or len(set(layers)) != 1 or context is None or first is None or last is None:
        raise UserError("the U-Net's tensors are incomplete; download the file again")
    blocks = 1 + _count(r"output_blocks\.(\d+)\.", shapes)
    check_count("U-Net", "output blocks", blocks, len(channels) * (layers[0] + 1))
    linear = len(shapes.get("middle_block.1.proj_in.weight", ())) == 2
    added = shapes.get("label_emb.0.0.weight")
    sized: dict[str, Any] = {}
    if added is not None:
        depths = [
            1 + _count(rf"input_blocks\.{1 + level * (layers[0] + 1)}\.1\.transformer_blocks\.(\d+)\.", shapes)
            for level in range(len(channels))
        ]
        sized = {
            "transformer_layers_per_block": tuple(depths),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": added[1],
        }
    return {
        "in_channels": first[1],
        "out_channels": last[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers[0],
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        # diffusers calls the number of heads "attention_head_dim"
        "attention_head_dim": tuple(max(c // HEAD_WIDTH_V2, 1) for c in channels) if linear else HEADS_V1,
        # fp16 products of SD 2.x's attention overflow; only the plain backend needs the cast
        "upcast_attention": linear and added is None,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        **sized,
    }


def _count(pattern: str, names: Mapping[str, object]) -> int:
    """The largest index that ``pattern`` finds at the start of the names; 0 if none."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=0)


def text_layers(unet: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the cross-attentions of a U-Net by the published names of its layers, in the order in which they run:
    IN01, IN02, IN04, ..., MID, OUT03, ... of SD 1.x and 2.x, numbered as LDM's input and output blocks.

    A ControlNet of a U-Net has the first of them, to MID.
    """
    numbered: list[tuple[str, nn.Module]] = []
    for side, first, blocks in (("IN", 1, unet.down_blocks), ("OUT", 0, getattr(unet, "up_blocks", ()))):
        if side == "OUT":
            numbered.append(("MID", unet.mid_block.attentions[0]))
        for block in blocks:
            attentions = getattr(block, "attentions", ())
            numbered += [(f"{side}{first + index:02d}", attention) for index, attention in enumerate(attentions)]
            first += len(block.resnets) + (side == "IN")
    return {name: [block.attn2 for block in found.transformer_blocks] for name, found in numbered}


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))


def set_unet_attention(unet: nn.Module, backend: str, *, split: bool = False) -> None:
    """Choose how a diffusers U-Net attends, see ``Architecture.set_attention``.

    Raises:
        UserError: the backend is not installed.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    if split or backend in ("flash", "flex", "sageattn"):
        from library.architectures.common.unet_attention import UnetAttention

        unet.set_attn_processor(UnetAttention(backend, split=split))
    elif backend == "xformers":
        from importlib.util import find_spec

        if find_spec("xformers") is None:
            raise UserError("--xformers: the package xformers is not installed; pip install xformers, or use --sdpa")
        unet.set_attn_processor(XFormersAttnProcessor())
    elif backend == "efficient":
        from library.memory.attention import MemoryEfficientAttention

        unet.set_attn_processor(MemoryEfficientAttention(AttnProcessor2_0()))
    elif backend == "torch":
        unet.set_attn_processor(AttnProcessor2_0())
    else:
        unet.set_attn_processor(AttnProcessor())
