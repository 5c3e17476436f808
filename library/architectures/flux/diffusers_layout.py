"""The transformer of FLUX.1 and Chroma in diffusers' layout, and in that of the published single file.

A *plan*, made from the table in ``names.py``, gives each tensor of one layout as rows of tensors of the other, so that
either can be streamed from the other, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.architectures.common.sharded_file import ShardedFile
from library.architectures.common.tensor_files import Shapes, WeightFile
from library.architectures.flux.names import Pair, Variant, file_prefix, part_rows, tensor_pairs
from library.errors import UserError, did_you_mean


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` (not included) of a tensor."""

    name: str
    start: int
    stop: int


#: tensor -> its pieces, joined along the first axis
Plan = Mapping[str, tuple[Rows, ...]]


# ---- plans ----


def published_plan(shapes: Shapes) -> Plan:
    """Return every tensor of the published layout as rows of tensors in diffusers' layout.

    Args:
        shapes: names and shapes in diffusers' layout.

    Raises:
        UserError: a tensor is missing or unknown; the message does not name the file.
    """
    pairs = _checked(shapes, "diffusers", lambda pair: pair.parts)
    return {pair.published: tuple(_rows_of_parts(pair, shapes)) for pair in pairs}


def diffusers_plan(shapes: Shapes) -> Plan:
    """Return every tensor of diffusers' layout as rows of tensors in the published layout.

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
        counts = [rows]
        if len(pair.parts) > 1:
            weight = f"{pair.published.rpartition('.')[0]}.weight"
            counts = part_rows(len(pair.parts), inputs=shapes[weight][1], outputs=rows)
        if min(counts) <= 0 or sum(counts) != rows:
            raise UserError(f"{pair.published} has {rows} rows, which fit no split; the file is damaged")
        start = 0
        for part, count in zip(pair.parts, counts, strict=True):
            plan[part] = (Rows(pair.published, start, start + count),)
            start += count
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
    """Return the pairs of a transformer, after checking that no tensor is missing or unknown."""
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
    """Return one tensor of a plan: a view of the source if it is one piece, else joined in new memory."""
    pieces = [read(rows.name)[rows.start : rows.stop] for rows in plan[name]]
    if len(pieces) == 1:
        return pieces[0]
    if pieces[0].element_size() == 1:  # fp8, which torch cannot concatenate
        return torch.cat([piece.contiguous().view(torch.uint8) for piece in pieces]).view(pieces[0].dtype)
    return torch.cat(pieces)


# ---- files ----


@dataclass(frozen=True)
class DiffusersTransformer(WeightFile):
    """A transformer in diffusers' layout, read by its published names; used like a ``ShardedFile``.

    Attributes:
        path: the given file or folder.
        shapes, dtypes: by published names.
        mapped: whether tensors that need no joining are views of the mapped files.
    """

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    plan: Plan = field(repr=False)
    file: ShardedFile = field(repr=False)
    mapped: bool = True

    @property
    def files(self) -> set[Path]:
        return self.file.files

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """Yield a function that returns the tensor of a published name, on the host; the files stay open within the
        context."""
        with replace(self.file, mapped=self.mapped).opened() as read:
            yield lambda name: join(self.plan, name, read)


def in_diffusers_layout(names: Iterable[str]) -> bool:
    """Whether these are the names of a FLUX.1 or Chroma transformer in diffusers' layout."""
    return any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names)


def open_diffusers_transformer(path: Path) -> DiffusersTransformer:
    """Open a transformer in diffusers' layout as a source of published names.

    Args:
        path: the pipeline's folder, its ``transformer`` folder, a shard of it, or a single file.

    Raises:
        UserError: a file, shard or tensor is missing, or it is no FLUX.1 or Chroma transformer.
    """
    file = _open(path)
    if _in_published_layout(file.shapes):
        raise UserError(f"{path}: is in the published layout already and needs no conversion")
    return published_view(file)


def open_transformer(path: Path) -> ShardedFile | DiffusersTransformer:
    """Open a transformer in either layout, by published names; the prefix of a single file stays.

    Args:
        path: a single file, or anything that ``open_diffusers_transformer`` takes.

    Raises:
        UserError: as ``open_diffusers_transformer``.
    """
    file = _open(path)
    if in_diffusers_layout(file.shapes):
        return published_view(file)
    if not _in_published_layout(file.shapes):
        example = next(iter(file.shapes), "nothing")
        raise UserError(f"{path}: not a FLUX.1 or Chroma transformer (it holds {example}, ...)")
    return file


def _open(path: Path) -> ShardedFile:
    inner = path / "transformer"
    return ShardedFile.open(inner if inner.is_dir() else path)


def _in_published_layout(names: Iterable[str]) -> bool:
    names = list(names)
    prefix = file_prefix(names)
    return any(name.startswith((f"{prefix}double_blocks.", f"{prefix}single_blocks.")) for name in names)


def variant_of(source: ShardedFile | DiffusersTransformer) -> Variant:
    """Return the variant of an opened transformer."""
    prefix = file_prefix(source.shapes)
    return Variant.of(name[len(prefix) :] for name in source.shapes if name.startswith(prefix))


def published_view(file: ShardedFile) -> DiffusersTransformer:
    """A transformer in diffusers' layout by its published names. Raises UserError for a tensor too many or too few."""
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
