"""Split adapters of joint modules into those of their parts and back, and fold strengths into weights.

A joint module's rows are those of its parts, one after another. Its adapter W += s * up @ down is, for part i,
W_i += s * up[rows_i] @ down: the parts share ``down``. Where each column of ``up`` is zero outside one part's rows (as
training with ``split_qkv`` writes it), a part needs only its own columns and their rows of ``down``. The way back is
the block diagonal of the parts, or the shared ``down`` again where all are equal.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from networks.files.adapter_file import ALPHA, DORA, DOWN, UP, Module

#: metadata key with the original alphas, so that converting back gives the same tensors
RECORD = "convert_lora_alphas"


# ---- joining and splitting ----


def to_original(modules: Iterable[Module], title: str) -> list[Module]:
    """Return modules with original paths; parts of joint modules are joined.

    Raises:
        UserError: a joint module's parts have more than a plain LoRA's tensors.
    """
    joined: list[Module] = []
    waiting: dict[tuple[str, str], dict[int, Module]] = defaultdict(dict)
    for module in modules:
        if module.space == "original":
            joined.append(module)
        else:
            place = module.places[0]
            waiting[module.part.diffusers, place.path][place.index] = module
    for (_, path), parts in waiting.items():
        first = next(iter(parts.values()))
        paths = first.part.paths
        if len(paths.to_diffusers(path)) == 1:
            tensors = _swapped(first, title) if paths.swaps_halves(path) else first.tensors
        else:
            tensors = _join(path, parts, title)
        joined.append(replace(first, space="original", path=path, tensors=tensors))
    return joined


def to_diffusers(module: Module, title: str) -> list[Module]:
    """Return diffusers' modules of a module with an original path.

    Raises:
        UserError: it would have to be split but has more than a plain LoRA's tensors, or its rows fit no split.
    """
    paths = module.part.paths
    names = paths.to_diffusers(module.path)
    if len(names) > 1:
        found = _split(module, title)
        return [replace(module, space="diffusers", path=names[i], tensors=tensors) for i, tensors in found.items()]
    tensors = _swapped(module, title) if paths.swaps_halves(module.path) else module.tensors
    return [replace(module, space="diffusers", path=names[0], tensors=tensors)]


def swap_halves(rows: Tensor) -> Tensor:
    """Swap the two halves of the rows."""
    return torch.cat(list(reversed(rows.chunk(2))))


def _swapped(module: Module, title: str) -> dict[str, Tensor]:
    _only_plain(module, {DOWN, UP, ALPHA}, title)
    return {**module.tensors, UP: swap_halves(module.tensors[UP])}


def _only_plain(module: Module, allowed: set[str], title: str) -> None:
    if extra := sorted(module.tensors.keys() - allowed):
        raise UserError(
            f"{title}: {module.name}.{extra[0]}: the other naming orders the module's rows differently, which is only "
            "defined for plain LoRA"
        )
    if missing := sorted({DOWN, UP} - module.tensors.keys()):
        raise UserError(f"{title}: {module.name}.{missing[0]} is missing")


def _join(path: str, parts: dict[int, Module], title: str) -> dict[str, Tensor]:
    """Join the adapters of a joint module's parts; parts without one get rows of zeros."""
    for module in parts.values():
        _only_plain(module, {DOWN, UP, ALPHA}, title)
    first = next(iter(parts.values()))
    paths = first.part.paths
    count = len(paths.to_diffusers(path))
    inputs = first.tensors[DOWN].shape[1]
    rows = paths.rows(path, inputs=inputs, outputs=None)
    for index, module in parts.items():
        rows[index] = module.tensors[UP].shape[0]
    strengths = {index: module.strength for index, module in parts.items()}
    same = len(set(strengths.values())) == 1
    downs = [module.tensors[DOWN] for module in parts.values()]
    # parts with different strengths have them folded into their weights
    ups = {
        i: m.tensors[UP] if same else scaled(m.tensors[UP], strengths[i], m.tensors[UP].dtype) for i, m in parts.items()
    }
    dtype = _widest(up.dtype for up in ups.values())
    if len(parts) == count and all(torch.equal(down, downs[0]) for down in downs):
        down, up = downs[0], torch.cat([ups[i].to(dtype) for i in range(count)])
    else:
        ordered = [parts[i].tensors[DOWN] for i in sorted(parts)]
        down_dtype = _widest(d.dtype for d in ordered)
        down = torch.cat([d.to(down_dtype) for d in ordered])
        up = torch.zeros(sum(rows), len(down), dtype=dtype)
        column = 0
        for index in sorted(parts):
            start, rank = sum(rows[:index]), ups[index].shape[1]
            up[start : start + rows[index], column : column + rank] = ups[index]
            column += rank
    joined = {DOWN: down, UP: up}
    if same and any(ALPHA in module.tensors for module in parts.values()):
        alpha = next(module.tensors[ALPHA] for module in parts.values() if ALPHA in module.tensors)
        joined[ALPHA] = _alpha_like(alpha, strengths[min(parts)] * len(down))
    return joined


def _split(module: Module, title: str) -> dict[int, dict[str, Tensor]]:
    """Return the tensors of each part that the joint module's adapter changes, by the part's index."""
    _only_plain(module, {DOWN, UP, ALPHA}, title)
    down, up = module.tensors[DOWN], module.tensors[UP]
    rows = module.part.paths.rows(module.path, inputs=down.shape[1], outputs=up.shape[0])
    if min(rows) <= 0 or sum(rows) != up.shape[0]:
        raise UserError(f"{title}: {module.name}: {up.shape[0]} outputs of {down.shape[1]} inputs fit no split")
    ups = up.split(rows)
    columns = _own_columns(ups)
    found: dict[int, dict[str, Tensor]] = {}
    for index, part in enumerate(ups):
        own = slice(0, up.shape[1]) if columns is None else columns[index]
        if own.stop == own.start:
            continue
        tensors = {DOWN: down[own], UP: part[:, own]}
        if ALPHA in module.tensors:
            tensors[ALPHA] = _alpha_like(module.tensors[ALPHA], module.strength * (own.stop - own.start))
        found[index] = tensors
    return found


def _own_columns(ups: Sequence[Tensor]) -> list[slice] | None:
    """Return each part's own columns of a block-sparse joint weight; None if parts share columns."""
    used = torch.stack([(up != 0).any(dim=0) for up in ups])  # (parts, rank)
    count, rank = used.shape
    if rank % count == 0:
        size = rank // count
        blocks = torch.eye(count, dtype=torch.bool).repeat_interleave(size, dim=1)
        if not (used & ~blocks).any():
            return [slice(i * size, (i + 1) * size) for i in range(count)]
    if (used.sum(dim=0) > 1).any() or not used.any():
        return None
    # a column of zeros belongs to the part of the column before it
    owners: list[int] = []
    for column in range(rank):
        own = used[:, column].nonzero()
        owners.append(int(own[0]) if len(own) else owners[-1] if owners else -1)
    owners = [next(o for o in owners if o >= 0) if owner < 0 else owner for owner in owners]
    if owners != sorted(owners):
        return None
    starts = [sum(owner < i for owner in owners) for i in range(count + 1)]
    return [slice(starts[i], starts[i + 1]) for i in range(count)]


# ---- strengths ----


def scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``tensor * factor`` in ``dtype``, or in float32 where that would lose bits."""
    if factor == 1.0:
        return tensor
    product = tensor.float() * factor
    narrow = product.to(dtype)
    return narrow if torch.equal(narrow.float(), product) else product


@dataclass(frozen=True)
class Folded:
    """A module without alpha, and the original alpha; ``widened`` if a tensor had to become float32."""

    module: Module
    record: dict[str, Any]
    widened: bool


def fold_strength(module: Module) -> Folded:
    """The same deltas with alpha = rank: the strength goes into ``up``.

    Powers of two are exact, other factors are where the product still fits the dtype. Where it does not (or would fall
    below float16's smallest numbers), ``down`` is tried, and then ``up`` becomes float32.
    """
    alpha = module.tensors.get(ALPHA)
    record: dict[str, Any] = {"alpha": None if alpha is None else alpha.tolist(), "folded": None}
    if alpha is not None:
        record["alpha_dtype"] = str(alpha.dtype).removeprefix("torch.")
    tensors = {name: tensor for name, tensor in module.tensors.items() if name != ALPHA}
    strength, widened = module.strength, False
    if strength != 1.0:
        up, down = tensors[UP], tensors[DOWN]
        new_up, new_down = scaled(up, strength, up.dtype), scaled(down, strength, down.dtype)
        if new_up.dtype == up.dtype or new_down.dtype != down.dtype:
            tensors[UP], folded = new_up, UP
            widened = new_up.dtype != up.dtype
        else:
            tensors[DOWN], folded = new_down, DOWN
        record |= {"folded": folded, "dtype": str(module.tensors[folded].dtype).removeprefix("torch.")}
    return Folded(replace(module, tensors=tensors), record, widened)


def restore_strength(module: Module, record: Mapping[str, Any] | None) -> Module:
    """Return a module with its alpha: from ``record``, otherwise alpha = rank or PEFT's configuration.

    A record that does not fit the tensors (any more) is ignored, so that it never changes the deltas.
    """
    tensors = dict(module.tensors)
    if not module.is_lora:
        return module
    if record is not None:
        alpha = _alpha_of(record)
        strength = 1.0 if alpha is None else float(alpha.sum()) / module.rank
        folded = record.get("folded")
        fits = True
        if folded in (UP, DOWN) and module.strength == 1.0 and strength:
            stored = tensors[folded]
            plain = (stored.float() / strength).to(_dtype(record.get("dtype"), stored.dtype))
            fits = torch.equal(plain.float() * strength, stored.float())
            if fits:
                tensors[folded] = plain
        else:  # PEFT's configuration has the strength, in decimals
            fits = math.isclose(module.strength, strength, rel_tol=1e-6)
        if fits:
            tensors.pop(ALPHA, None)
            if alpha is not None:
                tensors[ALPHA] = alpha
            return replace(module, tensors=tensors)
    if ALPHA not in tensors:
        rank = torch.tensor(float(module.rank))
        narrow = rank.to(tensors[UP].dtype)
        tensors[ALPHA] = narrow if float(narrow) == float(rank) else rank
    return replace(module, tensors=tensors)


def write_record(records: Mapping[str, dict[str, Any]]) -> str:
    """Write records by module as JSON; the most common one is written once."""
    as_text = Counter(json.dumps(record, sort_keys=True) for record in records.values())
    common = json.loads(as_text.most_common(1)[0][0]) if as_text else {}
    return json.dumps({"all": common, "modules": {n: r for n, r in records.items() if r != common}}, sort_keys=True)


def read_record(metadata: Mapping[str, str], module: str) -> dict[str, Any] | None:
    """Return the record of one module; None if there is no valid one."""
    try:
        content = json.loads(metadata.get(RECORD, "null"))
        record = content["modules"].get(module, content["all"])
        _alpha_of(record)
        return record
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _alpha_of(record: Mapping[str, Any]) -> Tensor | None:
    value = record["alpha"]
    return None if value is None else torch.tensor(value, dtype=_dtype(record.get("alpha_dtype"), torch.float32))


def _dtype(name: object, default: torch.dtype) -> torch.dtype:
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else default


def _alpha_like(alpha: Tensor, value: float) -> Tensor:
    """``value`` in the dtype of ``alpha``, or in float32 where that cannot hold it."""
    new = torch.tensor(value, dtype=torch.float64).to(alpha.dtype).reshape(alpha.shape)
    return new if float(new) == value else torch.tensor(value, dtype=torch.float32)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    widest, *others = dtypes
    for dtype in others:
        widest = torch.promote_types(widest, dtype)
    return widest


def magnitudes_on_output(module: Module) -> bool:
    """Whether a DoRA's magnitudes belong to output features, as PEFT's do."""
    return module.tensors[DORA].shape[0] == module.tensors[UP].shape[0]
