"""Transformers in diffusers' layout, read by their published names: what one layout joins, the other holds apart.

A *plan*, made from a family's table of layers, gives each tensor of one layout as rows of tensors of the other, so that
either can be streamed from the other, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.architectures.common.sharded_file import ShardedFile
from library.architectures.common.tensor_files import Shapes, WeightFile
from library.errors import UserError, did_you_mean


class Rows(NamedTuple):
    """Rows ``start`` to ``stop`` (not included) of a tensor."""

    name: str
    start: int
    stop: int


#: tensor -> what it is put together from, joined along the first axis
Plan = Mapping[str, tuple[Rows, ...]]


class Pair(NamedTuple):
    """One published tensor and those of diffusers whose rows it holds."""

    published: str
    parts: tuple[str, ...]
    halves_swapped: bool = False


def published_plan(pairs: Sequence[Pair], shapes: Shapes, *, title: str, unused: tuple[str, ...] = ()) -> Plan:
    """Return every tensor of the published layout as rows of those in diffusers'.

    Args:
        shapes: names and shapes in diffusers' layout.
        title: of the model, for messages.
        unused: beginnings of names that nothing is made of.

    Raises:
        UserError: a tensor is missing or unknown; the message does not name the file.
    """
    expected = {part for pair in pairs for part in pair.parts}
    known = {name: shape for name, shape in shapes.items() if not name.startswith(unused or ("\0",))}
    check_complete(known, expected, title=title, layout="diffusers")
    return {pair.published: tuple(_rows(pair, shapes)) for pair in pairs}


def check_complete(names: Collection[str], expected: Set[str], *, title: str, layout: str) -> None:
    """Raise UserError, without the file's name, where tensors of a transformer are missing or unknown."""
    if missing := sorted(expected - set(names)):
        raise UserError(
            f"{len(missing)} of the {len(expected)} tensors of a {title} transformer are missing, the first is "
            f"{missing[0]}; the file is incomplete or of another model, download it again"
        )
    if unknown := sorted(set(names) - expected):
        raise UserError(
            f"{unknown[0]} is no tensor of a {title} transformer in the {layout} layout"
            f"{did_you_mean(unknown[0], expected)}; the model is of another kind"
        )


def _rows(pair: Pair, shapes: Shapes) -> Iterator[Rows]:
    if pair.halves_swapped:
        rows = shapes[pair.parts[0]][0]
        yield Rows(pair.parts[0], rows // 2, rows)
        yield Rows(pair.parts[0], 0, rows // 2)
        return
    for part in pair.parts:
        yield Rows(part, 0, shapes[part][0])


def join(plan: Plan, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """One tensor of a plan; a view of the source where it is one piece of it, else put together in new memory."""
    pieces = [read(rows.name)[rows.start : rows.stop] for rows in plan[name]]
    if len(pieces) == 1:
        return pieces[0]
    if pieces[0].element_size() == 1:  # fp8, for which torch lacks joining
        return torch.cat([piece.contiguous().view(torch.uint8) for piece in pieces]).view(pieces[0].dtype)
    return torch.cat(pieces)


def open_theirs(
    path: Path, is_theirs: Callable[[Collection[str]], bool], view: Callable[[ShardedFile], JoinedFile]
) -> JoinedFile | None:
    """Open a transformer in diffusers' layout with published names; None for anything else.

    Args:
        path: a file, the transformer's folder, or that of its pipeline.
        is_theirs: whether names are those of diffusers' layout.
        view: gives the file its published names.
    """
    inner = path / "transformer"
    place = inner if inner.is_dir() else path
    if place.is_dir() and not any(place.glob("*.safetensors")):
        return None
    if not place.is_dir() and place.suffix != ".safetensors":
        return None
    file = ShardedFile.open(place)
    return view(file) if is_theirs(file.shapes) else None


@dataclass(frozen=True)
class JoinedFile(WeightFile):
    """A transformer in diffusers' layout, read by its published names.

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

    @staticmethod
    def of(file: ShardedFile, plan_of: Callable[[Shapes], Plan]) -> JoinedFile:
        """Args: ``plan_of`` makes the plan from diffusers' shapes. Raises UserError where it does not fit the file."""
        try:
            plan = plan_of(file.shapes)
            shapes = {name: _shape(pieces, file.shapes) for name, pieces in plan.items()}
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None
        dtypes = {}
        for name, pieces in plan.items():
            kinds = {file.dtypes[rows.name] for rows in pieces}
            if len(kinds) > 1:
                names = ", ".join(rows.name for rows in pieces)
                raise UserError(f"{file.path}: {names} are joined to {name} but have different dtypes")
            dtypes[name] = kinds.pop()
        return JoinedFile(file.path, shapes, dtypes, plan, file, file.mapped)

    @property
    def files(self) -> set[Path]:
        return self.file.files

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """A function that gives the tensor of a published name, on the host; the files stay open meanwhile."""
        with replace(self.file, mapped=self.mapped).opened() as read:
            yield lambda name: join(self.plan, name, read)


def _shape(pieces: tuple[Rows, ...], shapes: Shapes) -> tuple[int, ...]:
    widths = {shapes[rows.name][1:] for rows in pieces}
    if len(widths) > 1:
        raise UserError(f"{', '.join(rows.name for rows in pieces)} differ in width; the files are damaged")
    return (sum(rows.stop - rows.start for rows in pieces), *widths.pop())
