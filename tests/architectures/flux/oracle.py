"""diffusers' transformers with the weights of a published-layout file; the mapping is written out here on its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.fixtures.tiny_flux import FluxFileSizes


def to_diffusers(tensors: Mapping[str, Tensor], sizes: FluxFileSizes) -> dict[str, Tensor]:
    """Published names to diffusers', without anything of the library's."""
    width, out = sizes.hidden, {}

    def move(name: str, target: str, *, leaves: tuple[str, ...] = ("weight", "bias")) -> None:
        for leaf in leaves:
            if f"{name}.{leaf}" in tensors:
                out[f"{target}.{leaf}"] = tensors[f"{name}.{leaf}"]

    def split(name: str, targets: tuple[str, ...]) -> None:
        rows = [width] * 3 + ([4 * width] if len(targets) == 4 else [])
        for leaf in ("weight", "bias"):
            for target, tensor in zip(targets, tensors[f"{name}.{leaf}"].split(rows), strict=True):
                out[f"{target}.{leaf}"] = tensor

    def norm(name: str, target: str) -> None:
        out[f"{target}.weight"] = tensors[f"{name}.scale"]

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    embedders = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
    for ours, theirs in embedders.items():
        move(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        move(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")
    root = "distilled_guidance_layer"
    move(f"{root}.in_proj", f"{root}.in_proj")
    move(f"{root}.out_proj", f"{root}.out_proj")
    for layer in range(sizes.approximator_layers if f"{root}.in_proj.weight" in tensors else 0):
        move(f"{root}.layers.{layer}.in_layer", f"{root}.layers.{layer}.linear_1")
        move(f"{root}.layers.{layer}.out_layer", f"{root}.layers.{layer}.linear_2")
        norm(f"{root}.norms.{layer}", f"{root}.norms.{layer}")
    for index in range(sizes.double_blocks):
        ours, theirs = f"double_blocks.{index}", f"transformer_blocks.{index}"
        split(f"{ours}.img_attn.qkv", tuple(f"{theirs}.attn.to_{x}" for x in "qkv"))
        split(f"{ours}.txt_attn.qkv", tuple(f"{theirs}.attn.add_{x}_proj" for x in "qkv"))
        for x, part in (("q", "query"), ("k", "key")):
            norm(f"{ours}.img_attn.norm.{part}_norm", f"{theirs}.attn.norm_{x}")
            norm(f"{ours}.txt_attn.norm.{part}_norm", f"{theirs}.attn.norm_added_{x}")
        move(f"{ours}.img_attn.proj", f"{theirs}.attn.to_out.0")
        move(f"{ours}.txt_attn.proj", f"{theirs}.attn.to_add_out")
        for stream, ff, adaptive in (("img", "ff", "norm1"), ("txt", "ff_context", "norm1_context")):
            move(f"{ours}.{stream}_mlp.0", f"{theirs}.{ff}.net.0.proj")
            move(f"{ours}.{stream}_mlp.2", f"{theirs}.{ff}.net.2")
            move(f"{ours}.{stream}_mod.lin", f"{theirs}.{adaptive}.linear")
    for index in range(sizes.single_blocks):
        ours, theirs = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        split(f"{ours}.linear1", (*(f"{theirs}.attn.to_{x}" for x in "qkv"), f"{theirs}.proj_mlp"))
        move(f"{ours}.linear2", f"{theirs}.proj_out")
        move(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
        norm(f"{ours}.norm.query_norm", f"{theirs}.attn.norm_q")
        norm(f"{ours}.norm.key_norm", f"{theirs}.attn.norm_k")
    for leaf in ("weight", "bias"):
        name = f"final_layer.adaLN_modulation.1.{leaf}"
        if name in tensors:  # (shift, scale) here, (scale, shift) there
            out[f"norm_out.linear.{leaf}"] = torch.cat(tensors[name].chunk(2)[::-1])
    return out


def diffusers_model(tensors: Mapping[str, Tensor], sizes: FluxFileSizes) -> nn.Module:
    """``FluxTransformer2DModel`` or ``ChromaTransformer2DModel``, whichever the names are of."""
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

    rest = (sizes.head - 4) // 2
    settings = {
        "in_channels": sizes.in_channels,
        "num_layers": sizes.double_blocks,
        "num_single_layers": sizes.single_blocks,
        "attention_head_dim": sizes.head,
        "num_attention_heads": sizes.hidden // sizes.head,
        "joint_attention_dim": sizes.t5_width,
        "axes_dims_rope": (4, rest, rest),
    }
    if "distilled_guidance_layer.in_proj.weight" in tensors:
        model: nn.Module = ChromaTransformer2DModel(
            **settings,
            approximator_num_channels=sizes.approximator_inputs,
            approximator_hidden_dim=sizes.approximator_hidden,
            approximator_layers=sizes.approximator_layers,
        )
    else:
        guidance = "guidance_in.in_layer.weight" in tensors
        pooled = sizes.base.text_width
        model = FluxTransformer2DModel(**settings, pooled_projection_dim=pooled, guidance_embeds=guidance)
    model.load_state_dict(to_diffusers(tensors, sizes))
    return model
