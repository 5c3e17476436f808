"""Check whether two adapter files change a model's weights in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.architectures.adapters import Place
from library.errors import UserError
from networks.files.adapter_file import ALPHA, DOWN, UP, Module
from networks.files.reshape import swap_halves

_ROWS = 1024  # elements of a delta in memory at a time

#: a model and the place of a module in its original checkpoint
_Key = tuple[str, Place]


@dataclass(frozen=True)
class Difference:
    """The largest difference of two files' weight deltas; ``relative`` to the largest value of the module's delta."""

    absolute: float
    relative: float
    module: str
    modules: int


@dataclass(frozen=True)
class _Factors:
    up: Tensor  # (rows, rank), float32, with the strength
    down: Tensor  # (rank, inputs), float32
    name: str

    def rows(self, start: int) -> Tensor:
        return self.up[start : start + _ROWS] @ self.down


def compare(before: Iterable[Module], after: Iterable[Module], title: str, *, exact_tensors: bool) -> Difference:
    """Compare two files' deltas part by part, in float32; neither is split or joined for it.

    Args:
        title: of the second file, for messages.
        exact_tensors: whether renamed tensors (magnitudes, LoHa, ...) must be equal to the bit.

    Raises:
        UserError: a module is missing in one of them, or a tensor that was only renamed differs.
    """
    before, after = list(before), list(after)
    _compare_renamed(before, after, title, exact=exact_tensors)
    old, new = _factors(before, title), _factors(after, title)
    worst = Difference(0.0, 0.0, "", len(old))
    for key in old.keys() | new.keys():
        one, other = old.get(key), new.get(key)
        present = one or other
        assert present is not None
        if one and other and torch.equal(one.up, other.up) and torch.equal(one.down, other.down):
            continue  # equal factors, as in most conversions, need no products, which take minutes for large models
        absolute = largest = 0.0
        for start in range(0, len(present.up), _ROWS):
            # a part without an adapter has a change of zeros
            ours = torch.zeros(()) if one is None else one.rows(start)
            theirs = torch.zeros(()) if other is None else other.rows(start)
            if one and other and ours.shape != theirs.shape:
                raise UserError(f"{title}: {other.name}: a delta of another shape than {one.name}'s")
            absolute = max(absolute, float((ours - theirs).abs().max()))
            largest = max(largest, float(ours.abs().max()), float(theirs.abs().max()))
        relative = absolute / largest if largest else 0.0
        if relative > worst.relative or not worst.module:
            worst = Difference(max(absolute, worst.absolute), relative, present.name, len(old))
        elif absolute > worst.absolute:
            worst = Difference(absolute, worst.relative, worst.module, len(old))
    return worst


def _factors(modules: Iterable[Module], title: str) -> dict[_Key, _Factors]:
    found: dict[_Key, _Factors] = {}
    for module in modules:
        if not module.is_lora:
            continue
        paths, part = module.part.paths, module.part.diffusers
        up = module.tensors[UP].float().flatten(1) * module.strength
        down = module.tensors[DOWN].float().flatten(1)
        if not (up.isfinite().all() and down.isfinite().all()):
            raise UserError(f"{title}: {module.name}: has values that are not finite")
        places, rows = module.places, [len(up)]
        if module.space == "original":
            rows = paths.rows(module.path, inputs=down.shape[1], outputs=len(up))
        elif paths.swaps_halves(places[0].path):
            up = swap_halves(up)
        for place, part_of_up in zip(places, up.split(rows), strict=True):
            found[part, place] = _Factors(part_of_up, down, module.name)
    return found


def _compare_renamed(before: list[Module], after: list[Module], title: str, *, exact: bool) -> None:
    """Compare tensors outside of deltas: magnitudes, and those of other kinds of adapters."""
    old, new = _others(before), _others(after)
    for key in sorted(old.keys() ^ new.keys()):
        raise UserError(f"{title}: {'.'.join(key)} is in only one of the files")
    for key, tensor in old.items():
        if tensor.shape != new[key].shape or (exact and not torch.equal(tensor, new[key])):
            raise UserError(f"{title}: {'.'.join(key)} differs from the original's")


def _others(modules: Iterable[Module]) -> dict[tuple[str, str, str], Tensor]:
    found = {}
    for module in modules:
        for name, tensor in module.tensors.items():
            if name not in (DOWN, UP, ALPHA) or not module.is_lora:
                found[module.part.diffusers, module.places[0].path, name] = tensor
    return found
