"""Merge adapter files with each other: the sum of their changes, exact or of lower rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from networks.files.adapter_file import BIAS_CHANGE, DOWN, UP, Module
from networks.files.deltas import change_of, kind_of, needs_weight
from networks.files.lora_file import LoraFile, is_plain
from networks.files.svd import Decomposed, RankOf, decompose, decompose_product, fixed


@dataclass(frozen=True)
class Combined:
    """The tensors of a LoRA file, and how far its changes are from the sum.

    Attributes:
        error: largest share of a module's change (Frobenius norm) that its rank cannot hold; 0 if nothing is lost.
        module: the module with that share.
    """

    tensors: dict[str, Tensor]
    error: float
    module: str


def concatenate(files: Sequence[LoraFile], *, dtype: torch.dtype, device: torch.device) -> Combined:
    """Put all ranks side by side: exactly the sum of ratio * change, with the sum of the ranks.

    Raises:
        UserError: a kind other than plain LoRA, or shapes that differ.
    """
    tensors: dict[str, Tensor] = {}
    for name, members in _by_module(files).items():
        for file, module in members:
            if not is_plain(module):
                raise UserError(
                    f"{file.path}: {kind_of(module)} ({name}) has no ranks to put side by side; leave out --concat, or "
                    "merge into a model"
                )
        # the strength of the merged tensors, so that a single file at ratio 1 keeps its values
        scale = members[0][1].strength or 1.0
        downs, ups = [], []
        for file, module in members:
            down, up = _halves(module, file.strength(name) * module.strength / scale, dtype=dtype, device=device)
            downs.append(down)
            ups.append(up)
        _check_shapes(name, members, [(up.shape[0], *down.shape[1:]) for up, down in zip(ups, downs, strict=True)])
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        tensors |= _tensors(name, down, up, scale * down.shape[0])
    return Combined(tensors, 0.0, "")


def combine(
    files: Sequence[LoraFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank_of: RankOf | None = None,
    conv_rank_of: RankOf | None = None,
) -> Combined:
    """Return the nearest LoRA to the sum of ratio * change; alpha is the rank.

    Args:
        dtype: to compute in.
        rank_of: gives the rank from the singular values; None for the largest rank that a file has for the module.
        conv_rank_of: the same for convolutions with a kernel.

    Raises:
        UserError: DoRA and OFT, which depend on a weight that is not given; changes of biases; shapes that differ.
    """
    tensors: dict[str, Tensor] = {}
    worst, where = 0.0, ""
    for name, members in _by_module(files).items():
        for file, module in members:
            if needs_weight(module) or BIAS_CHANGE in module.tensors:
                what = "changes of biases" if BIAS_CHANGE in module.tensors else kind_of(module)
                raise UserError(f"{file.path}: {what} ({name}) cannot be merged with others; merge into a model")
        if len(members) == 1 and is_plain(members[0][1]) and rank_of is None:
            file, module = members[0]  # nothing to add: the values stay, only the strength changes
            down, up = _halves(module, file.strength(name), dtype=dtype, device=device)
            tensors |= _tensors(name, down, up, module.strength * module.rank)
            continue
        found, shape = _decomposed(name, members, dtype=dtype, device=device)
        choose = conv_rank_of if conv_rank_of is not None and len(shape) == 4 and shape[2:] != (1, 1) else rank_of
        rank = (choose or fixed(_most(members, name)))(found.values)
        up, down = found.factors(rank)
        if (lost := found.lost(rank)) > worst:
            worst, where = lost, name
        down, up = down.view(rank, *shape[1:]), up.view(shape[0], rank, *(1,) * (len(shape) - 2))
        tensors |= _tensors(name, down, up, float(rank))
    return Combined(tensors, worst, where)


def _by_module(files: Sequence[LoraFile]) -> dict[str, list[tuple[LoraFile, Module]]]:
    found: dict[str, list[tuple[LoraFile, Module]]] = defaultdict(list)
    for file in files:
        for name, module in file.modules.items():
            found[name].append((file, module))
    return found


def _decomposed(
    name: str, members: Sequence[tuple[LoraFile, Module]], *, dtype: torch.dtype, device: torch.device
) -> tuple[Decomposed, tuple[int, ...]]:
    """Return the sum of the changes, decomposed, and its shape."""
    # torch decomposes in float32 and float64 only
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    if all(is_plain(module) for _, module in members):
        halves = [
            _halves(module, file.strength(name) * module.strength, dtype=wide, device=device)
            for file, module in members
        ]
        shapes = [(up.shape[0], *down.shape[1:]) for down, up in halves]
        _check_shapes(name, members, shapes)
        up = torch.cat([up.flatten(1) for _, up in halves], dim=1)
        down = torch.cat([down.flatten(1) for down, _ in halves])
        return decompose_product(up, down), shapes[0]
    changes = []
    for file, module in members:
        change = change_of(module, dtype=wide)
        assert change is not None
        changes.append(change.to(device) * file.strength(name))
    _check_shapes(name, members, [tuple(change.shape) for change in changes])
    return decompose(sum(changes[1:], changes[0]).flatten(1)), tuple(changes[0].shape)


def _halves(module: Module, factor: float, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (down, up) times ``factor``: its square root on each side, its sign on one."""
    root = math.sqrt(abs(factor))
    down = module.tensors[DOWN].to(device=device, dtype=dtype) * math.copysign(root, factor)
    return down, module.tensors[UP].to(device=device, dtype=dtype) * root


def _most(members: Sequence[tuple[LoraFile, Module]], name: str) -> int:
    """Return the largest rank that a file has for a module.

    Raises:
        UserError: no file has one.
    """
    ranks = [0]
    for _, module in members:
        tensors = module.tensors
        if DOWN in tensors:
            ranks.append(tensors[DOWN].shape[0])
        elif "hada_w1_b" in tensors:  # the elementwise product of two matrices of rank r has rank r * r at most
            ranks.append(tensors["hada_w1_b"].shape[0] * tensors["hada_w2_b"].shape[0])
    if not max(ranks):
        file, module = members[0]
        raise UserError(
            f"{file.path}: {kind_of(module)} ({name}) has no rank of its own; networks/svd_merge_lora.py --new_rank "
            "says how large it becomes"
        )
    return max(ranks)


def _tensors(name: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": down.cpu().contiguous(),
        f"{name}.lora_up.weight": up.cpu().contiguous(),
        f"{name}.alpha": torch.tensor(alpha),
    }


def _check_shapes(name: str, members: Sequence[tuple[LoraFile, Module]], shapes: Sequence[tuple[int, ...]]) -> None:
    first = members[0][0]
    for (file, _), shape in zip(members, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f"{file.path}: {name} changes a weight of another shape than in {first.path}; "
                "the two were made for different models"
            )
