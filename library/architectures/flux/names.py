"""Names in files of FLUX.1 and Chroma: the one table of their layers, published and in diffusers.

Names: Black Forest Labs' published files, and diffusers' ``FluxTransformer2DModel`` and ``ChromaTransformer2DModel``.
The two differ in names, in joined layers (``qkv`` of the attentions; ``linear1`` of the single blocks: q, k, v and the
first half of the MLP), and in the order of shift and scale in the last layer's modulation. In paths of the table ``{}``
is the number of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from library.architectures.common.joined_layout import Pair

DEV, SCHNELL, CHROMA = "dev", "schnell", "chroma"
TITLES = {DEV: "FLUX.1 dev", SCHNELL: "FLUX.1 schnell", CHROMA: "Chroma"}

#: published layer -> diffusers' layers, in the order of its rows
Table = Mapping[str, tuple[str, ...]]

_COMMON: Table = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
}
#: layers that Chroma's approximator replaces
_FLUX: Table = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_GUIDANCE: Table = {
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
}
_APPROXIMATOR = "distilled_guidance_layer"
_CHROMA: Table = {
    f"{_APPROXIMATOR}.in_proj": (f"{_APPROXIMATOR}.in_proj",),
    f"{_APPROXIMATOR}.out_proj": (f"{_APPROXIMATOR}.out_proj",),
    f"{_APPROXIMATOR}.layers.{{}}.in_layer": (f"{_APPROXIMATOR}.layers.{{}}.linear_1",),
    f"{_APPROXIMATOR}.layers.{{}}.out_layer": (f"{_APPROXIMATOR}.layers.{{}}.linear_2",),
}
#: every linear layer of any of the models
LINEARS: Table = {**_COMMON, **_FLUX, **_GUIDANCE, **_CHROMA}
#: (shift, scale) of the last layer, in diffusers (scale, shift)
SWAPPED_HALVES = frozenset({"final_layer.adaLN_modulation.1"})

_NORMS: Table = {
    "double_blocks.{}.img_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_q",),
    "double_blocks.{}.img_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_k",),
    "double_blocks.{}.txt_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_added_q",),
    "double_blocks.{}.txt_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_added_k",),
    "single_blocks.{}.norm.query_norm": ("single_transformer_blocks.{}.attn.norm_q",),
    "single_blocks.{}.norm.key_norm": ("single_transformer_blocks.{}.attn.norm_k",),
}
_CHROMA_NORMS: Table = {f"{_APPROXIMATOR}.norms.{{}}": (f"{_APPROXIMATOR}.norms.{{}}",)}

#: tensors that every transformer has in the published layout
SIGN = "double_blocks.0.img_attn.norm.query_norm.scale"
#: outputs of the MLP's first layer for each input
MLP_RATIO = 4


@dataclass(frozen=True)
class Variant:
    """The properties that decide which tensors a transformer has.

    Attributes:
        kind: ``DEV`` (with guidance), ``SCHNELL``, or ``CHROMA`` (one approximator instead of modulation layers).
        double_blocks, single_blocks, approximator_layers: how many there are.
    """

    kind: str
    double_blocks: int
    single_blocks: int
    approximator_layers: int

    @staticmethod
    def of(names: Iterable[str]) -> Variant:
        """Recognize a variant by the names of either layout, without prefix."""
        names = list(names)
        if any(name.startswith(f"{_APPROXIMATOR}.") for name in names):
            kind = CHROMA
        else:
            has_guidance = any(name.startswith("guidance_in.") or ".guidance_embedder." in name for name in names)
            kind = DEV if has_guidance else SCHNELL
        return Variant(
            kind,
            double_blocks=_count(names, r"(?:double_blocks|transformer_blocks)\.(\d+)\."),
            single_blocks=_count(names, r"(?:single_blocks|single_transformer_blocks)\.(\d+)\."),
            approximator_layers=_count(names, rf"{_APPROXIMATOR}\.(?:layers|norms)\.(\d+)\."),
        )

    @property
    def title(self) -> str:
        return TITLES[self.kind]


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def tensor_pairs(variant: Variant) -> Iterator[Pair]:
    """Yield every tensor of a transformer."""
    is_chroma = variant.kind == CHROMA
    linears = {**_COMMON, **(_CHROMA if is_chroma else _FLUX), **(_GUIDANCE if variant.kind == DEV else {})}
    for template, published, parts in _numbered(linears, variant):
        for leaf in ("weight", "bias"):
            names = tuple(f"{part}.{leaf}" for part in parts)
            yield Pair(f"{published}.{leaf}", names, template in SWAPPED_HALVES)
    for _, published, parts in _numbered({**_NORMS, **(_CHROMA_NORMS if is_chroma else {})}, variant):
        yield Pair(f"{published}.scale", (f"{parts[0]}.weight",))


def _numbered(table: Table, variant: Variant) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(line of the table, published layer, diffusers' layers), for each number of a block."""
    counts = {
        "double_blocks": variant.double_blocks,
        "single_blocks": variant.single_blocks,
        _APPROXIMATOR: variant.approximator_layers,
    }
    for template, parts in table.items():
        count = counts[template.partition(".")[0]] if "{}" in template else 1
        for number in map(str, range(count)):
            yield template, template.replace("{}", number), tuple(part.replace("{}", number) for part in parts)


def part_rows(parts: int, *, inputs: int, outputs: int | None = None) -> list[int]:
    """Return the rows of each of a joint layer's ``parts``: q, k, v are as wide as the input, the rest is the MLP's.

    Args:
        outputs: of the joint layer; None where not all parts are known, for the ratio of the published models.
    """
    mlp = MLP_RATIO * inputs if outputs is None else outputs - 3 * inputs
    return [inputs] * 3 + [mlp] * (parts - 3)


def file_prefix(names: Iterable[str]) -> str:
    """Return the prefix of the transformer's names in a file of the published layout.

    User interfaces write ``model.diffusion_model.``, alone or with the other models in one file.
    """
    return next((name.removesuffix(SIGN) for name in names if name.endswith(SIGN)), "")
