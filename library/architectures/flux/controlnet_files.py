"""ControlNets of FLUX.1 that read pixels, by their published names; in training, their start from the transformer.

The layout is that of x-flux (XLabs AI 2024): the input layers and some double blocks of the transformer, a linear layer
behind each of them, and convolutions that read an image. diffusers' ``FluxControlNetModel`` computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.tensor_files import Shapes
from library.architectures.flux.names import DEV, SCHNELL, Variant, tensor_pairs
from library.architectures.flux.sizes import PATCH, FluxSizes
from library.errors import UserError

#: a tensor of every ControlNet that reads pixels, by its published name
SIGN = "input_hint_block.0.weight"
#: double blocks of a new ControlNet
_BLOCKS = 2
#: published name of the image's convolutions -> diffusers'
_HINT = {0: "conv_in", **{2 * n + 2: f"blocks.{n}" for n in range(6)}, 14: "conv_out"}
#: q, k and v, which published files hold as one; the middle name stands for them while names are mapped
_JOINED = tuple(
    (f"{stream}_qkv.{leaf}", tuple(name.format(x=x) + f".{leaf}" for x in "qkv"))
    for stream, name in (("img", "to_{x}"), ("txt", "add_{x}_proj"))
    for leaf in ("weight", "bias")
)


def published_layout(blocks: int, *, guidance: bool) -> TensorLayout:
    """Return the published layout of a ControlNet with so many double blocks."""
    variant = Variant(DEV if guidance else SCHNELL, blocks, 0, 0)
    pairs = [("controlnet_blocks", "controlnet_blocks"), ("pos_embed_input", "controlnet_x_embedder")]
    pairs += [(f"input_hint_block.{number}", f"input_hint_block.{name}") for number, name in _HINT.items()]
    return TensorLayout(KeyMap([*pairs, *_of_transformer(variant)]), stacked=_JOINED)


def _of_transformer(variant: Variant) -> Iterator[tuple[str, str]]:
    for pair in tensor_pairs(variant):
        if pair.published.startswith("final_layer."):
            continue
        if len(pair.parts) == 1:
            yield pair.published, pair.parts[0]
            continue
        stem, _, leaf = pair.published.rpartition(".")
        stream = "img" if ".img_attn." in stem else "txt"
        yield pair.published, f"{pair.parts[0].partition('.attn.')[0]}.attn.{stream}_qkv.{leaf}"


def config_of(sizes: FluxSizes, *, blocks: int = _BLOCKS) -> dict[str, Any]:
    """Return the settings of ``FluxControlNetModel`` for a ControlNet that reads pixels, beside this transformer."""
    return {
        "patch_size": PATCH,
        "in_channels": sizes.in_channels,
        "num_layers": blocks,
        "num_single_layers": 0,
        "attention_head_dim": sizes.head,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": sizes.context,
        "pooled_projection_dim": sizes.pooled,
        "guidance_embeds": sizes.guidance,
        "axes_dims_rope": list(sizes.rope_axes),
        "conditioning_embedding_channels": sizes.in_channels // PATCH**2,
    }


def infer_published(shapes: Shapes, transformer: FluxSizes) -> tuple[TensorLayout, dict[str, Any]]:
    """Return layout and settings of a ControlNet in the published layout.

    Raises:
        UserError: it does not fit the transformer.
    """
    hidden, channels = shapes.get("img_in.weight", (0, 0))
    theirs = (hidden, channels, shapes.get("txt_in.weight", (0, 0))[1])
    ours = (transformer.hidden, transformer.in_channels, transformer.context)
    if theirs != ours:
        raise UserError(f"it is of other sizes than the transformer (widths {theirs} and {ours}); give one of FLUX.1")
    guidance = any(name.startswith("guidance_in.") for name in shapes)
    if guidance != transformer.guidance:
        kinds = ("dev", "schnell") if guidance else ("schnell", "dev")
        raise UserError(f"it is for FLUX.1 {kinds[0]}, and the transformer is {kinds[1]}; give one for that")
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"double_blocks\.(\d+)\.", name))]
    blocks = 1 + max(numbers, default=-1)
    return published_layout(blocks, guidance=guidance), config_of(transformer, blocks=blocks)


def start_from_transformer(build: Any, transformer: ModelSource, sizes: FluxSizes, *, device: str) -> nn.Module:
    """Return a ControlNet in float32 with the weights of the transformer's input layers and first blocks.

    Args:
        build: makes the module of a configuration.
    """
    config = config_of(sizes, blocks=min(_BLOCKS, sizes.double_blocks))
    with torch.device(device):
        controlnet: nn.Module = build(config)
    if device == "meta":
        return controlnet
    layout = published_layout(config["num_layers"], guidance=sizes.guidance)
    own: Mapping[str, Any] = controlnet.state_dict()
    published = {n: transformer.layout.model_names(n) for n in transformer.file_names()}
    names = [n for n, (name,) in published.items() if layout.model_names(name)]
    read = transformer.layout.read(transformer.file.read(names))
    with torch.no_grad():
        for name, tensor in layout.read(read):
            own[name].copy_(tensor)
    return controlnet
