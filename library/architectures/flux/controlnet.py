"""A frozen ControlNet beside the transformer of FLUX.1, by diffusers' ``FluxControlNetModel``.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543): a smaller copy of
the transformer reads an image beside the noisy latents, and its outputs are added behind the transformer's blocks.

Shape legend: as in model.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common.checkpoint import locate
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.sharded_file import ShardedFile
from library.architectures.common.tensor_files import Shapes
from library.architectures.flux.controlnet_files import SIGN, infer_published
from library.architectures.flux.packing import pack_latents
from library.architectures.flux.sizes import PATCH, FluxSizes
from library.errors import UserError

FLAG = "--controlnet_model_name_or_path"
_TOP = (
    "x_embedder", "context_embedder", "time_text_embed", "transformer_blocks", "single_transformer_blocks",
    "controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder", "input_hint_block",
)  # fmt: skip

#: outputs to add behind the transformer's blocks of two streams and of one, (B, N, D) each
Residuals = tuple[list[Tensor] | None, list[Tensor] | None]


def controlnet_source(path_or_id: str, transformer: FluxSizes, *, pixels: bool = False) -> ModelSource:
    """Return the ControlNet in a file, a folder or a Hub repository, from its names and shapes.

    Args:
        transformer: that it must fit.
        pixels: whether it must read pixels, in diffusers' or the published layout; else latents, in diffusers'.

    Raises:
        UserError: nothing there, something else, or a ControlNet that cannot be used.
    """
    path = locate(path_or_id, flag=FLAG, components=("", "controlnet"))
    inner = path / "controlnet"
    file = ShardedFile.open(inner if inner.is_dir() else path)
    try:
        if pixels and SIGN in file.shapes:
            return ModelSource("ControlNet", file, *infer_published(file.shapes, transformer))
        config = infer_config(file.shapes, transformer, pixels=pixels)
    except UserError as error:
        raise UserError(f"{FLAG} {path_or_id}: {error}") from None
    return ModelSource("ControlNet", file, TensorLayout(KeyMap((name, name) for name in _TOP)), config)


def infer_config(shapes: Shapes, transformer: FluxSizes, *, pixels: bool = False) -> dict[str, Any]:
    """Return settings of ``FluxControlNetModel``.

    Raises:
        UserError: the names are those of something else, or of a ControlNet that does not fit or cannot be used.
    """
    needed = {
        "image": "controlnet_x_embedder.weight",
        "latents": "x_embedder.weight",
        "text": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "head": "transformer_blocks.0.attn.norm_q.weight",
    }
    if missing := [name for name in needed.values() if name not in shapes]:
        raise UserError(
            f"not a ControlNet of FLUX.1 in diffusers' layout (no {missing[0]}; its first tensor is "
            f"{next(iter(shapes), 'none')})"
        )
    if "controlnet_mode_embedder.weight" in shapes:
        raise UserError(
            "a union ControlNet, which takes a mode as a condition, is not supported; give one of a single kind"
        )
    hint = shapes.get("input_hint_block.conv_out.weight")
    if not pixels and any(name.startswith("input_hint_block.") for name in shapes):
        raise UserError("it reads pixels instead of latents, which is not supported; give one that reads latents")
    if pixels and hint is None:
        raise UserError("it reads latents; give one that reads pixels, such as this program trains")
    found = {what: shapes[name] for what, name in needed.items()}
    width, channels = found["latents"]
    if found["image"][1] != channels:
        raise UserError(f"it takes {found['image'][1]} channels of an image, not {channels}, as one for inpainting")
    theirs = (width, channels, found["text"][1], found["pooled"][1])
    ours = (transformer.hidden, transformer.in_channels, transformer.context, transformer.pooled)
    if theirs != ours:
        raise UserError(f"it is of other sizes than the transformer (widths {theirs} and {ours}); give one of FLUX.1")
    head = found["head"][0]
    own = {} if hint is None else {"patch_size": PATCH, "conditioning_embedding_channels": hint[0]}
    return {
        **own,
        "in_channels": channels,
        "num_layers": _count(r"transformer_blocks\.(\d+)\.", shapes),
        "num_single_layers": _count(r"single_transformer_blocks\.(\d+)\.", shapes),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": found["text"][1],
        "pooled_projection_dim": found["pooled"][1],
        "guidance_embeds": any(".guidance_embedder." in name for name in shapes),
        "axes_dims_rope": list(transformer.rope_axes),
    }


def _count(pattern: str, names: Shapes) -> int:
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


def load_controlnet(source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Load a ControlNet, frozen, in eval mode."""
    return load_frozen(source, partial(build, source.config), dtype=dtype, device=device)


def build(config: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

    return FluxControlNetModel(**config)


def residuals(
    controlnet: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    pooled: Tensor,
    guidance: Tensor,
    *,
    image: Tensor,
) -> Residuals:
    """Return the residuals of a ControlNet.

    Args:
        latents, timesteps, context, pooled, guidance: as ``Flux.forward`` is given them; latents (B, C/4, h, w).
        image: latents (B, C/4, h, w) of the image that it reads, or its pixels (B, 3, H, W) in [-1, 1].
    """
    h, w = (side // PATCH for side in latents.shape[2:])
    reads_pixels = controlnet.config.conditioning_embedding_channels is not None
    image_ids = torch.zeros(h, w, 3, device=latents.device)
    image_ids[..., 1] += torch.arange(h, device=latents.device)[:, None]
    image_ids[..., 2] += torch.arange(w, device=latents.device)
    return controlnet(
        hidden_states=pack_latents(latents),
        controlnet_cond=image.to(latents.dtype) if reads_pixels else pack_latents(image.to(latents.dtype)),
        timestep=timesteps,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        guidance=guidance if controlnet.config.guidance_embeds else None,
        txt_ids=torch.zeros(context.shape[1], 3, device=latents.device),
        img_ids=image_ids.flatten(0, 1),
        return_dict=False,
    )
