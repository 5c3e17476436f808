"""The transformer of FLUX.1 and Chroma in diffusers' layout, and in that of the published single file.

The two differ in names, in what is joined (``qkv`` of the attentions; ``linear1`` of the single blocks: q, k, v and
the first half of the MLP), and in the order of shift and scale in the last layer's modulation. One table says it for
both directions; a *plan* made from it gives each tensor as rows of tensors of the other layout, so that either layout
can be streamed from the other, tensor by tensor.

Names: Black Forest Labs' published files, and diffusers' ``FluxTransformer2DModel`` and ``ChromaTransformer2DModel``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.architectures.common.sharded_file import ShardedFile
from library.architectures.common.tensor_files import Shapes
from library.errors import UserError, did_you_mean

#: what some single files put before every name
PREFIX = "model.diffusion_model."

_LEAVES = ("weight", "bias")
_EMBEDDERS = (
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
)
_GUIDANCE = (
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
)
_ENDS = (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out"))
#: the halves stand in the other order there
_LAST_MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")
_APPROXIMATOR = "distilled_guidance_layer"

_DOUBLE_MODULATIONS = (("img_mod.lin", "norm1.linear"), ("txt_mod.lin", "norm1_context.linear"))
_DOUBLE = (
    ("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("img_attn.proj", "attn.to_out.0"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
)
_DOUBLE_NORMS = (
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
_SINGLE_MODULATIONS = (("modulation.lin", "norm.linear"),)
_SINGLE = (("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("linear2", "proj_out"))
_SINGLE_NORMS = (("norm.query_norm", "attn.norm_q"), ("norm.key_norm", "attn.norm_k"))


class Pair(NamedTuple):
    """One published tensor (or module) and those of diffusers whose rows it holds."""

    published: str
    parts: tuple[str, ...]
    halves_swapped: bool = False


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` (not included) of a tensor."""

    name: str
    start: int
    stop: int


#: tensor -> what it is put together from, joined along the first axis
Plan = Mapping[str, tuple[Rows, ...]]


@dataclass(frozen=True)
class Variant:
    """What decides which tensors a transformer has.

    Attributes:
        is_chroma: modulations come from one approximator, not from layers of the blocks.
        has_guidance: FLUX.1 dev.
        double_blocks, single_blocks, approximator_layers: how many there are.
    """

    is_chroma: bool
    has_guidance: bool
    double_blocks: int
    single_blocks: int
    approximator_layers: int = 0

    @staticmethod
    def of(names: Iterable[str]) -> Variant:
        """By the names of either layout, without prefix."""
        names = list(names)
        starts = {name.partition(".")[0] for name in names}
        return Variant(
            is_chroma=_APPROXIMATOR in starts,
            has_guidance="guidance_in" in starts or any("guidance_embedder" in name for name in names),
            double_blocks=_count(names, r"(?:double_blocks|transformer_blocks)\.(\d+)\."),
            single_blocks=_count(names, r"(?:single_blocks|single_transformer_blocks)\.(\d+)\."),
            approximator_layers=_count(names, rf"{_APPROXIMATOR}\.(?:layers|norms)\.(\d+)\."),
        )

    @property
    def title(self) -> str:
        if self.is_chroma:
            return "Chroma"
        return "FLUX.1 dev" if self.has_guidance else "FLUX.1 schnell"


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def module_pairs(variant: Variant) -> Iterator[Pair]:
    """The linear layers, without ``.weight`` and ``.bias``."""
    for published, *parts in (
        *_ENDS,
        *(() if variant.is_chroma else _EMBEDDERS),
        *(_GUIDANCE if variant.has_guidance else ()),
    ):
        yield Pair(published, tuple(parts))
    if variant.is_chroma:
        for name in ("in_proj", "out_proj"):
            yield Pair(f"{_APPROXIMATOR}.{name}", (f"{_APPROXIMATOR}.{name}",))
        for i in range(variant.approximator_layers):
            layer = f"{_APPROXIMATOR}.layers.{i}"
            yield Pair(f"{layer}.in_layer", (f"{layer}.linear_1",))
            yield Pair(f"{layer}.out_layer", (f"{layer}.linear_2",))
    else:
        yield Pair(_LAST_MODULATION[0], (_LAST_MODULATION[1],), halves_swapped=True)
    for i in range(variant.double_blocks):
        modules = _DOUBLE if variant.is_chroma else _DOUBLE + _DOUBLE_MODULATIONS
        yield from _in_block(modules, f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(variant.single_blocks):
        modules = _SINGLE if variant.is_chroma else _SINGLE + _SINGLE_MODULATIONS
        yield from _in_block(modules, f"single_blocks.{i}", f"single_transformer_blocks.{i}")


def tensor_pairs(variant: Variant) -> Iterator[Pair]:
    """Every tensor of a transformer."""
    for pair in module_pairs(variant):
        for leaf in _LEAVES:
            parts = tuple(f"{part}.{leaf}" for part in pair.parts)
            yield Pair(f"{pair.published}.{leaf}", parts, pair.halves_swapped)
    norms = [Pair(f"{_APPROXIMATOR}.norms.{i}", (f"{_APPROXIMATOR}.norms.{i}",)) for i in range(_norm_count(variant))]
    for i in range(variant.double_blocks):
        norms += _in_block(_DOUBLE_NORMS, f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(variant.single_blocks):
        norms += _in_block(_SINGLE_NORMS, f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    for pair in norms:
        yield Pair(f"{pair.published}.scale", (f"{pair.parts[0]}.weight",))


def _norm_count(variant: Variant) -> int:
    return variant.approximator_layers if variant.is_chroma else 0


def _in_block(modules: Iterable[Sequence[str]], published_block: str, block: str) -> Iterator[Pair]:
    for published, *parts in modules:
        yield Pair(f"{published_block}.{published}", tuple(f"{block}.{part}" for part in parts))


# ---- plans ----


def published_plan(shapes: Shapes) -> Plan:
    """Every tensor of the published layout as rows of those of a transformer in diffusers'.

    Args:
        shapes: names and shapes in diffusers' layout.

    Raises:
        UserError: a tensor is missing or unknown; the message does not name the file.
    """
    pairs = _checked(shapes, "diffusers", lambda pair: pair.parts)
    return {pair.published: tuple(_rows_of_parts(pair, shapes)) for pair in pairs}


def diffusers_plan(shapes: Shapes) -> Plan:
    """Every tensor of diffusers' layout as rows of those of a transformer in the published one.

    Args:
        shapes: names, without prefix, and shapes in the published layout.

    Raises:
        UserError: as ``published_plan``.
    """
    plan: dict[str, tuple[Rows, ...]] = {}
    for pair in _checked(shapes, "published", lambda pair: (pair.published,)):
        rows = shapes[pair.published][0]
        if pair.halves_swapped:
            half = rows // 2
            plan[pair.parts[0]] = (Rows(pair.published, half, rows), Rows(pair.published, 0, half))
            continue
        # q, k and v have as many rows as the block has channels; the rest is the MLP's
        module = pair.published.rpartition(".")[0]
        channels = shapes[f"{module}.weight"][1] if len(pair.parts) > 1 else rows
        ends = [min(channels * n, rows) for n in range(len(pair.parts))] + [rows]
        for part, start, stop in zip(pair.parts, ends[:-1], ends[1:], strict=True):
            plan[part] = (Rows(pair.published, start, stop),)
    return plan


def _rows_of_parts(pair: Pair, shapes: Shapes) -> Iterator[Rows]:
    if pair.halves_swapped:
        rows = shapes[pair.parts[0]][0]
        yield Rows(pair.parts[0], rows // 2, rows)
        yield Rows(pair.parts[0], 0, rows // 2)
        return
    for part in pair.parts:
        yield Rows(part, 0, shapes[part][0])


def _checked(shapes: Shapes, layout: str, needed: Callable[[Pair], tuple[str, ...]]) -> list[Pair]:
    """The pairs of a transformer all of whose tensors are there, and no others."""
    variant = Variant.of(shapes)
    if not variant.double_blocks and not variant.single_blocks:
        example = next(iter(shapes), "nothing")
        raise UserError(f"not a FLUX.1 or Chroma transformer in the {layout} layout (it holds {example}, ...)")
    pairs = list(tensor_pairs(variant))
    expected = {name for pair in pairs for name in needed(pair)}
    if missing := sorted(expected - shapes.keys()):
        raise UserError(
            f"{len(missing)} of the {len(expected)} tensors of a {variant.title} transformer are missing, the first "
            f"is {missing[0]}; the file is incomplete or of another model, download it again"
        )
    if unknown := sorted(shapes.keys() - expected):
        raise UserError(
            f"{unknown[0]} is no tensor of a {variant.title} transformer in the {layout} layout"
            f"{did_you_mean(unknown[0], expected)}; the model is of another kind"
        )
    return pairs


def join(plan: Plan, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """One tensor of a plan; a view of the source where it is one piece of it, else put together in new memory."""
    pieces = [read(rows.name)[rows.start : rows.stop] for rows in plan[name]]
    if len(pieces) == 1:
        return pieces[0]
    if pieces[0].element_size() == 1:  # fp8, for which torch lacks joining
        return torch.cat([piece.contiguous().view(torch.uint8) for piece in pieces]).view(pieces[0].dtype)
    return torch.cat(pieces)


# ---- files ----


@dataclass(frozen=True)
class DiffusersTransformer:
    """A transformer in diffusers' layout, read by its published names; in use like a ``ShardedFile``.

    Attributes:
        path: what was named.
        shapes, dtypes: by published names.
        mapped: whether tensors that need no joining are views of the mapped files.
    """

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    plan: Plan = field(repr=False)
    file: ShardedFile = field(repr=False)
    mapped: bool = True

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that gives the tensor of a published name, on the host; the files stay open meanwhile."""
        with replace(self.file, mapped=self.mapped).opened() as read:
            yield lambda name: join(self.plan, name, read)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Stream the named tensors in order, on the host, one at a time."""
        with self.opened() as read:
            for name in names:
                yield name, read(name)

    def on_meta(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The same without data: tensors of their shapes on the meta device; the files are not touched."""
        for name in names:
            yield name, torch.empty(self.shapes[name], device="meta")


def in_diffusers_layout(names: Iterable[str]) -> bool:
    """Whether these are the names of a FLUX.1 or Chroma transformer in diffusers' layout."""
    return any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names)


def open_diffusers_transformer(path: Path) -> DiffusersTransformer:
    """A transformer in diffusers' layout as a source of published names.

    Args:
        path: the pipeline's folder, its ``transformer`` folder, a shard of it, or a single file.

    Raises:
        UserError: a file, shard or tensor is missing, or it is no FLUX.1 or Chroma transformer.
    """
    file = _open(path)
    if _in_published_layout(file.shapes):
        raise UserError(f"{path}: is in the published layout already and needs no conversion")
    return _published_view(file)


def open_transformer(path: Path) -> ShardedFile | DiffusersTransformer:
    """A transformer in either layout, by the names of the published one; a prefix of a single file stays.

    Args:
        path: a single file, or what ``open_diffusers_transformer`` takes.

    Raises:
        UserError: as ``open_diffusers_transformer``.
    """
    file = _open(path)
    if in_diffusers_layout(file.shapes):
        return _published_view(file)
    if not _in_published_layout(file.shapes):
        example = next(iter(file.shapes), "nothing")
        raise UserError(f"{path}: not a FLUX.1 or Chroma transformer (it holds {example}, ...)")
    return file


def _open(path: Path) -> ShardedFile:
    inner = path / "transformer"
    return ShardedFile.open(inner if inner.is_dir() else path)


def _in_published_layout(names: Iterable[str]) -> bool:
    return any(name.removeprefix(PREFIX).startswith(("double_blocks.", "single_blocks.")) for name in names)


def variant_of(source: ShardedFile | DiffusersTransformer) -> Variant:
    """Which transformer an opened one is."""
    return Variant.of(name.removeprefix(PREFIX) for name in source.shapes)


def _published_view(file: ShardedFile) -> DiffusersTransformer:
    try:
        plan = published_plan(file.shapes)
        shapes = {name: _shape(pieces, file.shapes) for name, pieces in plan.items()}
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    dtypes = {}
    for name, pieces in plan.items():
        kinds = {file.dtypes[rows.name] for rows in pieces}
        if len(kinds) > 1:
            raise UserError(
                f"{file.path}: {', '.join(rows.name for rows in pieces)} are joined to {name} but have different dtypes"
            )
        dtypes[name] = kinds.pop()
    return DiffusersTransformer(file.path, shapes, dtypes, plan, file, file.mapped)


def _shape(pieces: tuple[Rows, ...], shapes: Shapes) -> tuple[int, ...]:
    widths = {shapes[rows.name][1:] for rows in pieces}
    if len(widths) > 1:
        raise UserError(f"{', '.join(rows.name for rows in pieces)} differ in width; the files are damaged")
    return (sum(rows.stop - rows.start for rows in pieces), *widths.pop())
