"""Names in files of HunyuanImage-2.1: one table of its layers, with published names and diffusers'.

Names: Tencent's published file, and diffusers' ``HunyuanImageTransformer2DModel``, which has query, key, value and the
first layer of the MLP apart, and the last modulation's scale first. In paths of the table ``{}`` is the number of a
block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from library.architectures.common.expected import block_count
from library.architectures.common.joined_layout import Pair, Plan, published_plan
from library.architectures.common.tensor_files import Shapes
from library.architectures.common.transformer_layouts import TransformerLayouts

#: published layer -> diffusers' layers, in the order of its rows
Table = Mapping[str, tuple[str, ...]]

#: a tensor of every transformer in the published layout
SIGN = "byt5_in.layernorm.weight"
#: modules of the distilled and refiner models, which the base model lacks
DISTILLED = ("guidance_in", "time_r_in")
_TEXT, _REFINER = "context_embedder.time_text_embed", "context_embedder.token_refiner.refiner_blocks"
FINAL = "final_layer.adaLN_modulation.1"

OUTER: Table = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_guidance_embed.timestep_embedder.linear_2",),
    "byt5_in.fc1": ("context_embedder_2.linear_1",),
    "byt5_in.fc2": ("context_embedder_2.linear_2",),
    "byt5_in.fc3": ("context_embedder_2.linear_3",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": (f"{_TEXT}.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": (f"{_TEXT}.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": (f"{_TEXT}.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": (f"{_TEXT}.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    FINAL: ("norm_out.linear",),
}
_REFINED: Table = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
_DOUBLE: Table = {
    "img_mod.linear": ("norm1.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mod.linear": ("norm1_context.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
_SINGLE: Table = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.linear": ("norm.linear",),
}
#: list of blocks -> (diffusers' name of it, its layers, its norms)
LISTS: Mapping[str, tuple[str, Table, Table]] = {
    "txt_in.individual_token_refiner.blocks": (_REFINER, _REFINED, {"norm1": ("norm1",), "norm2": ("norm2",)}),
    "double_blocks": (
        "transformer_blocks",
        _DOUBLE,
        {
            "img_attn_q_norm": ("attn.norm_q",),
            "img_attn_k_norm": ("attn.norm_k",),
            "txt_attn_q_norm": ("attn.norm_added_q",),
            "txt_attn_k_norm": ("attn.norm_added_k",),
        },
    ),
    "single_blocks": ("single_transformer_blocks", _SINGLE, {"q_norm": ("attn.norm_q",), "k_norm": ("attn.norm_k",)}),
}


#: endings of modules' names in ComfyUI's adapter files, as FLUX.1 calls these layers -> the published ones
COMFYUI_ENDINGS = {
    "img_mlp_0": "img_mlp_fc1",
    "img_mlp_2": "img_mlp_fc2",
    "txt_mlp_0": "txt_mlp_fc1",
    "txt_mlp_2": "txt_mlp_fc2",
    "img_mod_lin": "img_mod_linear",
    "txt_mod_lin": "txt_mod_linear",
    "modulation_lin": "modulation_linear",
}


def _in_block(ours: str, theirs: str, table: Table, number: str) -> Table:
    return {f"{ours}.{number}.{name}": tuple(f"{theirs}.{number}.{part}" for part in table[name]) for name in table}


#: every linear layer
LINEARS: Table = {
    **OUTER,
    **{
        name: parts
        for ours, (theirs, layers, _) in LISTS.items()
        for name, parts in _in_block(ours, theirs, layers, "{}").items()
    },
}


def tensor_pairs(names: Iterable[str]) -> Iterator[Pair]:
    """Yield the published name and diffusers' names of every tensor of a transformer.

    Args:
        names: diffusers', which tell how many blocks there are.
    """
    names = list(names)
    for leaf in ("weight", "bias"):
        yield Pair(f"byt5_in.layernorm.{leaf}", (f"context_embedder_2.norm.{leaf}",))
        for name, parts in OUTER.items():
            yield Pair(f"{name}.{leaf}", tuple(f"{part}.{leaf}" for part in parts), name == FINAL)
    for ours, (theirs, layers, norms) in LISTS.items():
        for number in map(str, range(block_count(names, theirs))):
            for name, parts in _in_block(ours, theirs, layers, number).items():
                for leaf in ("weight", "bias"):
                    yield Pair(f"{name}.{leaf}", tuple(f"{part}.{leaf}" for part in parts))
            for name, parts in _in_block(ours, theirs, norms, number).items():
                for leaf in ("weight", "bias") if ours.startswith("txt_in") else ("weight",):
                    yield Pair(f"{name}.{leaf}", (f"{parts[0]}.{leaf}",))


def diffusers_plan(shapes: Shapes) -> Plan:
    """Return every published tensor as rows of the tensors in diffusers' layout."""
    return published_plan(list(tensor_pairs(shapes)), shapes, title="HunyuanImage-2.1")


LAYOUTS = TransformerLayouts(
    "hunyuan_image",
    "HunyuanImage-2.1 transformer",
    modules=("img_in", "txt_in", "byt5_in", "time_in", "double_blocks", "single_blocks", "final_layer"),
    sign=SIGN,
    theirs="context_embedder_2.",
    plan=diffusers_plan,
)  # fmt: skip
