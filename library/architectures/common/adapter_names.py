"""Names of adapters that several families share: U-Nets of Stable Diffusion, CLIP and T5 text encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from library.architectures.adapters import (
    AdapterNaming,
    ModulePaths,
    Place,
    SamePaths,
    Shapes,
    Space,
    WeightPlace,
    places_below,
)
from library.architectures.common import clip
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.ldm_unet import LDM_PREFIX, infer_unet_config, ldm_unet_layout

# ---- the U-Net ----

_UNET_WORDS = """
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op conv
    time_embed label_emb out
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers conv1 conv2 conv_shortcut time_emb_proj
    time_embedding add_embedding linear_1 linear_2 conv_in conv_out
    proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj
"""
#: the U-Net's own file in a diffusers folder that is read as one model
_UNET_FOLDER = "unet."

_USUAL: Mapping[Space, re.Pattern[str]] = {
    "diffusers": re.compile(r"\.attentions\."),
    "original": re.compile(r"\.(proj_in|proj_out|transformer_blocks\..*)$"),
}
_CONVS: Mapping[Space, re.Pattern[str]] = {
    "diffusers": re.compile(r"\.(resnets|downsamplers|upsamplers)\."),
    "original": re.compile(r"\.(in_layers|out_layers|emb_layers)\.|\.(skip_connection|op|conv)$"),
}


class UNetPaths(ModulePaths):
    """The U-Net of Stable Diffusion: LDM's blocks against diffusers', transformers alike in both."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(_UNET_WORDS.split())
        self._keys: KeyMap = ldm_unet_layout(config).keys

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        path = self._keys.to_model(original)
        return (path,) if path is not None and self._is_known(original) else ()

    def to_original(self, diffusers: str) -> Place | None:
        path = self._keys.to_file(diffusers)
        return Place(path) if path is not None and self._is_known(diffusers) else None


def unet_naming(attention: Sequence[bool], published: Space, **config: Any) -> AdapterNaming:
    """A U-Net with two residual blocks in each level, ``attention`` telling which levels have transformers."""
    kinds: Iterable[str] = ("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention)
    return AdapterNaming(
        "U-Net",
        UNetPaths({"down_block_types": tuple(kinds), "layers_per_block": 2, **config}),
        kohya=("lora_unet_",),
        diffusers="unet",
        comfyui=("diffusion_model",),
        locate=partial(_unet_places, published=published),
        usual=_USUAL[published],
        convs=_CONVS[published],
        published=published,
    )


def _unet_places(shapes: Shapes, *, published: Space) -> dict[str, WeightPlace]:
    """Return the place of every weight of a U-Net, in an original file or in a diffusers folder."""
    if f"{LDM_PREFIX}input_blocks.0.0.weight" in shapes:
        keys = ldm_unet_layout(infer_unet_config(shapes)).keys
        return {
            (keys.to_model(path) or path) if published == "diffusers" else path: place
            for path, place in _below(shapes, LDM_PREFIX)
        }
    if f"{_UNET_FOLDER}conv_in.weight" not in shapes:
        return {}
    found = dict(_below(shapes, _UNET_FOLDER))
    if published == "diffusers":
        return found
    attention = _levels_with_attention(found)
    config = {"down_block_types": attention, "layers_per_block": _count(found, r"down_blocks\.0\.resnets\.(\d+)\.")}
    keys = ldm_unet_layout({**config, "addition_embed_type": "add_embedding.linear_1" in found or None}).keys
    return {keys.to_file(path) or path: place for path, place in found.items()}


def _below(shapes: Shapes, prefix: str) -> Iterable[tuple[str, WeightPlace]]:
    for name, shape in shapes.items():
        if name.startswith(prefix) and name.endswith(".weight"):
            yield name[len(prefix) : -len(".weight")], WeightPlace(name, shape)


def _levels_with_attention(paths: Iterable[str]) -> tuple[str, ...]:
    paths = list(paths)
    return tuple(
        "CrossAttnDownBlock2D" if any(p.startswith(f"down_blocks.{n}.attentions.") for p in paths) else "DownBlock2D"
        for n in range(_count(paths, r"down_blocks\.(\d+)\."))
    )


def _count(paths: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for path in paths if (found := re.match(pattern, path))), default=-1)


# ---- text encoders ----

CLIP = SamePaths(
    """
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection
""".split()
)
T5 = SamePaths(
    """
    encoder block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo shared relative_attention_bias
    layer_norm final_layer_norm
""".split()
)
_CLIP_USUAL = re.compile(r"\.(self_attn|mlp)\.")
_T5_USUAL = re.compile(r"\.SelfAttention\.[qkvo]$|\.DenseReluDense\.")


def clip_naming(
    title: str, kohya: str, diffusers: str, comfyui: str, *, below: Sequence[str] = ("",), openclip: str | None = None,
    unused_layers: int = 0,
) -> AdapterNaming:  # fmt: skip
    """A CLIP text encoder.

    Args:
        below: what precedes transformers' names in model files, with or without the level ``text_model.``.
        openclip: what precedes OpenCLIP's names in them.
        unused_layers: at the end of OpenCLIP's, which the family never computes.
    """

    def locate(shapes: Shapes) -> dict[str, WeightPlace]:
        if openclip is not None and f"{openclip}positional_embedding" in shapes:
            return _openclip_places(shapes, openclip, unused_layers)
        for prefix in below:
            level = "" if any(name.startswith(prefix + clip.TEXT_MODEL) for name in shapes) else clip.TEXT_MODEL
            own = {name: s for name, s in shapes.items() if name.startswith(prefix)}
            root = f"{prefix}{'' if level else clip.TEXT_MODEL}encoder.layers."
            if any(name.startswith(root) for name in own):
                return {level + path: place for path, place in _below(own, prefix)}
        return places_below(shapes, "encoder.layers.", level=clip.TEXT_MODEL) if "" in below else {}

    return AdapterNaming(
        title, CLIP, (kohya,), diffusers, (f"text_encoders.{comfyui}.transformer",), locate, _CLIP_USUAL
    )


def _openclip_places(shapes: Shapes, prefix: str, unused_layers: int) -> dict[str, WeightPlace]:
    layers = _count(
        (name[len(prefix) :] for name in shapes if name.startswith(prefix)), r"transformer\.resblocks\.(\d+)\."
    )
    layout: TensorLayout = clip.openclip_layout(layers - unused_layers, prefix=prefix, projection=True)
    found = {}
    for name, shape in shapes.items():
        names = layout.model_names(name)
        for number, model_name in enumerate(names):
            if not model_name.endswith(".weight"):
                continue
            path, count = model_name.removesuffix(".weight"), shape[0] // len(names)
            if model_name in layout.transposed:
                found[path] = WeightPlace(name, (shape[1], shape[0]), transposed=True)
            elif len(names) > 1:
                rows = slice(number * count, (number + 1) * count)
                found[path] = WeightPlace(name, (count, *shape[1:]), rows)
            else:
                found[path] = WeightPlace(name, shape)
    return found


def t5_naming(kohya: tuple[str, ...], diffusers: str) -> AdapterNaming:
    """A T5-XXL encoder; files have its own names, with or without a prefix."""
    locate = partial(places_below, sign="encoder.block.")
    return AdapterNaming("T5-XXL", T5, kohya, diffusers, ("text_encoders.t5xxl.transformer",), locate, _T5_USUAL)
