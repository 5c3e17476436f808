"""The transformer of FLUX.1 and Chroma in diffusers' layout, and in that of the published single file.

A *plan*, made from the table in ``names.py``, gives each tensor of one layout as rows of tensors of the other, so that
either can be streamed from the other, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from library.architectures.common import joined_layout
from library.architectures.common.joined_layout import JoinedFile, Plan, Rows, check_complete
from library.architectures.common.sharded_file import ShardedFile
from library.architectures.common.tensor_files import Shapes
from library.architectures.flux.names import Variant, file_prefix, part_rows, tensor_pairs
from library.errors import UserError

# ---- plans ----


def published_plan(shapes: Shapes) -> Plan:
    """Return every tensor of the published layout as rows of tensors in diffusers' layout.

    Args:
        shapes: names and shapes in diffusers' layout.

    Raises:
        UserError: a tensor is missing or unknown; the message does not name the file.
    """
    variant = _variant(shapes, "diffusers")
    return joined_layout.published_plan(list(tensor_pairs(variant)), shapes, title=variant.title)


def diffusers_plan(shapes: Shapes) -> Plan:
    """Return every tensor of diffusers' layout as rows of tensors in the published layout.

    Args:
        shapes: names, without prefix, and shapes in the published layout.

    Raises:
        UserError: as ``published_plan``.
    """
    plan: dict[str, tuple[Rows, ...]] = {}
    variant = _variant(shapes, "published")
    pairs = list(tensor_pairs(variant))
    check_complete(shapes, {pair.published for pair in pairs}, title=variant.title, layout="published")
    for pair in pairs:
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


def _variant(shapes: Shapes, layout: str) -> Variant:
    """Return which transformer these names are of. Raises UserError for names of something else."""
    variant = Variant.of(shapes)
    if not variant.double_blocks and not variant.single_blocks:
        example = next(iter(shapes), "nothing")
        raise UserError(f"not a FLUX.1 or Chroma transformer in the {layout} layout (it holds {example}, ...)")
    return variant


# ---- files ----


def in_diffusers_layout(names: Iterable[str]) -> bool:
    """Whether these are the names of a FLUX.1 or Chroma transformer in diffusers' layout."""
    return any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names)


def open_diffusers_transformer(path: Path) -> JoinedFile:
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


def open_transformer(path: Path) -> ShardedFile | JoinedFile:
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


def variant_of(source: ShardedFile | JoinedFile) -> Variant:
    """Return the variant of an opened transformer."""
    prefix = file_prefix(source.shapes)
    return Variant.of(name[len(prefix) :] for name in source.shapes if name.startswith(prefix))


def published_view(file: ShardedFile) -> JoinedFile:
    """A transformer in diffusers' layout by its published names. Raises UserError for a tensor too many or too few."""
    return JoinedFile.of(file, published_plan)
