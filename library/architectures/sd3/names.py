"""Names in files of Stable Diffusion 3 and 3.5: one table of their layers, with published names and diffusers'.

Names: Stability AI's published files, and diffusers' ``SD3Transformer2DModel``. The two differ in names, in joined
layers (``qkv`` of the attentions), and in the order of shift and scale in the last modulations. In paths of the table
``{}`` is the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from library.architectures.common.expected import block_count
from library.architectures.common.joined_layout import Pair, Plan, published_plan
from library.architectures.common.tensor_files import Shapes
from library.architectures.common.transformer_layouts import TransformerLayouts

#: published layer -> diffusers' layers, in the order of its rows
Table = Mapping[str, tuple[str, ...]]

#: prefix of every name of the transformer in published files
PREFIX = "model.diffusion_model."
#: layers of every transformer in the published layout
SIGN = "joint_blocks.0.context_block.attn.qkv.weight"
_MARK = re.compile(r"(^|\.)joint_blocks\.")

OUTER: Table = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_BLOCK, _THEIRS = "joint_blocks.{}", "transformer_blocks.{}"


def _qkv(stem: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}" for name in names)


_PLAIN = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
#: of every block
EVERY: Table = {
    f"{_BLOCK}.x_block.attn.qkv": _qkv(f"{_THEIRS}.attn", _PLAIN),
    f"{_BLOCK}.x_block.attn.proj": (f"{_THEIRS}.attn.to_out.0",),
    f"{_BLOCK}.x_block.mlp.fc1": (f"{_THEIRS}.ff.net.0.proj",),
    f"{_BLOCK}.x_block.mlp.fc2": (f"{_THEIRS}.ff.net.2",),
    f"{_BLOCK}.x_block.adaLN_modulation.1": (f"{_THEIRS}.norm1.linear",),
    f"{_BLOCK}.context_block.attn.qkv": _qkv(f"{_THEIRS}.attn", _ADDED),
    f"{_BLOCK}.context_block.adaLN_modulation.1": (f"{_THEIRS}.norm1_context.linear",),
}
#: of all blocks but the last, after which the text is not used
NOT_LAST: Table = {
    f"{_BLOCK}.context_block.attn.proj": (f"{_THEIRS}.attn.to_add_out",),
    f"{_BLOCK}.context_block.mlp.fc1": (f"{_THEIRS}.ff_context.net.0.proj",),
    f"{_BLOCK}.context_block.mlp.fc2": (f"{_THEIRS}.ff_context.net.2",),
}
#: of blocks with a second attention of the image to itself
DUAL: Table = {
    f"{_BLOCK}.x_block.attn2.qkv": _qkv(f"{_THEIRS}.attn2", _PLAIN),
    f"{_BLOCK}.x_block.attn2.proj": (f"{_THEIRS}.attn2.to_out.0",),
}
#: every linear layer of any of the models
LINEARS: Table = {**OUTER, **EVERY, **NOT_LAST, **DUAL}
_NORMS: Table = {
    f"{_BLOCK}.x_block.attn.ln_q": (f"{_THEIRS}.attn.norm_q",),
    f"{_BLOCK}.x_block.attn.ln_k": (f"{_THEIRS}.attn.norm_k",),
    f"{_BLOCK}.context_block.attn.ln_q": (f"{_THEIRS}.attn.norm_added_q",),
    f"{_BLOCK}.context_block.attn.ln_k": (f"{_THEIRS}.attn.norm_added_k",),
}
_DUAL_NORMS: Table = {
    f"{_BLOCK}.x_block.attn2.ln_q": (f"{_THEIRS}.attn2.norm_q",),
    f"{_BLOCK}.x_block.attn2.ln_k": (f"{_THEIRS}.attn2.norm_k",),
}


@dataclass(frozen=True)
class Variant:
    """The properties that decide which tensors a transformer has."""

    depth: int
    qk_norm: bool
    dual: frozenset[int]

    @staticmethod
    def of(names: Iterable[str]) -> Variant:
        """Read them from diffusers' names."""
        names = list(names)
        dual = (re.match(r"transformer_blocks\.(\d+)\.attn2\.", name) for name in names)
        return Variant(
            depth=block_count(names, "transformer_blocks"),
            qk_norm=any(name.endswith(".attn.norm_q.weight") for name in names),
            dual=frozenset(int(found[1]) for found in dual if found),
        )

    def swaps_halves(self, published: str) -> bool:
        """Whether diffusers has the layer's scale first: in the last layer, and in the text's last block."""
        return published in (
            "final_layer.adaLN_modulation.1",
            f"joint_blocks.{self.depth - 1}.context_block.adaLN_modulation.1",
        )


def tensor_pairs(variant: Variant) -> Iterator[Pair]:
    """Yield the published name and diffusers' names of every tensor of a transformer."""
    yield Pair("pos_embed", ("pos_embed.pos_embed",))
    for published, parts in _layers(variant):
        for leaf in ("weight", "bias"):
            yield Pair(
                f"{published}.{leaf}", tuple(f"{part}.{leaf}" for part in parts), variant.swaps_halves(published)
            )
    for number in range(variant.depth if variant.qk_norm else 0):
        for published, parts in {**_NORMS, **(_DUAL_NORMS if number in variant.dual else {})}.items():
            yield Pair(f"{_at(published, number)}.weight", (f"{_at(parts[0], number)}.weight",))


def _layers(variant: Variant) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from OUTER.items()
    for number in range(variant.depth):
        last = number == variant.depth - 1
        table = {**EVERY, **({} if last else NOT_LAST), **(DUAL if number in variant.dual else {})}
        for published, parts in table.items():
            yield _at(published, number), tuple(_at(part, number) for part in parts)


def _at(template: str, number: int) -> str:
    return template.replace("{}", str(number))


def diffusers_plan(shapes: Shapes) -> Plan:
    """Return every published tensor as rows of the tensors in diffusers' layout."""
    return published_plan(list(tensor_pairs(Variant.of(shapes))), shapes, title="Stable Diffusion 3")


LAYOUTS = TransformerLayouts(
    "sd3",
    "Stable Diffusion 3 checkpoint",
    modules=(
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "context_embedder", "joint_blocks", "final_layer",
    ),
    sign=SIGN,
    theirs="pos_embed.pos_embed",
    plan=diffusers_plan,
)  # fmt: skip
