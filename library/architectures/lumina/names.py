"""Names in files of Lumina-Image 2.0: the one table of their layers, published and in diffusers.

Names: Alpha-VLLM's published file, and diffusers' ``Lumina2Transformer2DModel``, which lacks the norm that nothing uses
and has query, key and value apart. In paths of the table ``{}`` is the number of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from library.architectures.common.expected import block_count
from library.architectures.common.joined_layout import Pair, Plan, published_plan
from library.architectures.common.tensor_files import Shapes
from library.architectures.common.transformer_layouts import TransformerLayouts

#: published layer -> diffusers' layers, in the order of its rows
Table = Mapping[str, tuple[str, ...]]

#: what every transformer has in the published layout
SIGN = "cap_embedder.0.weight"
_TEXT = "time_caption_embed"

OUTER: Table = {
    "x_embedder": ("x_embedder",),
    "cap_embedder.1": (f"{_TEXT}.caption_embedder.1",),
    "t_embedder.mlp.0": (f"{_TEXT}.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": (f"{_TEXT}.timestep_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
#: query, key and value in one layer
QKV = "attention.qkv"
#: query heads for each head of keys and values in the published model
_GROUP = 3
#: of a block of each list, without the modulation
BLOCK: Table = {
    QKV: ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
}
MODULATION: Table = {"adaLN_modulation.1": ("norm1.linear",)}
LISTS = ("noise_refiner", "context_refiner", "layers")
MODULATED = ("noise_refiner", "layers")
#: every linear layer
LINEARS: Table = {
    **OUTER,
    **{
        f"{blocks}.{{}}.{published}": tuple(f"{blocks}.{{}}.{part}" for part in parts)
        for blocks in LISTS
        for published, parts in {**BLOCK, **(MODULATION if blocks in MODULATED else {})}.items()
    },
}
_NORMS: Table = {
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "attention_norm2": ("norm2",),
    "ffn_norm1": ("ffn_norm1",),
    "ffn_norm2": ("ffn_norm2",),
}


@dataclass(frozen=True)
class Variant:
    """The number of blocks in each list."""

    counts: Mapping[str, int]

    @staticmethod
    def of(names: Iterable[str]) -> Variant:
        """Count the blocks by the names of either layout, without prefix."""
        names = list(names)
        return Variant({blocks: block_count(names, blocks) for blocks in LISTS})


#: layers without a bias
_NO_BIAS = (QKV, "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def tensor_pairs(variant: Variant) -> Iterator[Pair]:
    """Yield every tensor of a transformer in diffusers' layout."""
    yield Pair("cap_embedder.0.weight", (f"{_TEXT}.caption_embedder.0.weight",))
    for template, parts in LINEARS.items():
        blocks = template.partition(".")[0]
        for number in range(variant.counts[blocks] if "{}" in template else 1):
            published = template.replace("{}", str(number))
            for leaf in ("weight",) if published.endswith(_NO_BIAS) else ("weight", "bias"):
                yield Pair(f"{published}.{leaf}", tuple(f"{part.replace('{}', str(number))}.{leaf}" for part in parts))
    for blocks, count in variant.counts.items():
        first = "norm1.norm" if blocks in MODULATED else "norm1"
        for number in range(count):
            for published, parts in {**_NORMS, "attention_norm1": (first,)}.items():
                yield Pair(f"{blocks}.{number}.{published}.weight", (f"{blocks}.{number}.{parts[0]}.weight",))


def qkv_widths(inputs: int, outputs: int | None) -> tuple[int, int, int]:
    """Return the rows of query, key and value in their joint layer; without ``outputs`` those as published."""
    shared = inputs // _GROUP if outputs is None else (outputs - inputs) // 2
    return (inputs, shared, shared)


def diffusers_plan(shapes: Shapes) -> Plan:
    """Return every published tensor as rows of the tensors in diffusers' layout."""
    return published_plan(list(tensor_pairs(Variant.of(shapes))), shapes, title="Lumina-Image 2.0")


LAYOUTS = TransformerLayouts(
    "lumina",
    "Lumina-Image 2.0 transformer",
    modules=(
        "x_embedder", "noise_refiner", "context_refiner", "t_embedder", "cap_embedder", "layers", "norm_final",
        "final_layer",
    ),
    sign=SIGN,
    theirs=f"{_TEXT}.",
    plan=diffusers_plan,
)  # fmt: skip
