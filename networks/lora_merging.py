"""Merge LoRA files into the weights of a model, and with each other, by names and shapes, without building models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, did_you_mean
from library.files.precisions import cast
from library.randomness import permutation
from networks.conversion.adapter_file import (
    BIAS_CHANGE,
    DORA,
    DOWN,
    LORA_TENSORS,
    UP,
    WEIGHT_CHANGE,
    Module,
    read_adapter,
)
from networks.conversion.families import FLUX_OR_CHROMA, Part
from networks.conversion.reshape import to_original
from networks.model_keys import ModelPart

#: elements of a weight that are merged at a time
_CHUNK = 1 << 22
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class LowRank:
    """The change of one linear layer: (alpha / rank) up @ down.

    Attributes:
        down: (rank, in).
        up: (out, rank).
        scale: alpha / rank.
        dora_scale: magnitudes of a DoRA, (1, in) or (out, 1); see ``networks/dora.py``.
    """

    down: Tensor
    up: Tensor
    scale: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])


@dataclass(frozen=True)
class Adapter:
    """A file's changes of one layer: a low-rank change and full changes of the weight and of the bias, each
    optional."""

    part: Part
    low_rank: LowRank | None
    weight: Tensor | None  # (out, in)
    bias: Tensor | None  # (out,)


@dataclass(frozen=True)
class LoraFile:
    """One file to merge.

    Attributes:
        ratio: the strength it is merged with.
        adapters: by published names.
        is_diffusers: whether the file has diffusers' names.
    """

    path: Path
    ratio: float
    adapters: Mapping[str, Adapter]
    metadata: Mapping[str, str]
    is_diffusers: bool

    @staticmethod
    def open(path: Path, ratio: float) -> LoraFile:
        """Open a file. Raises UserError if it is missing, damaged, or no LoRA for FLUX.1, Chroma or a text encoder."""
        file = read_adapter(path, FLUX_OR_CHROMA)
        adapters = {
            module.part.name("kohya", module.path): _adapter(module, str(path))
            for module in to_original(file.modules, str(path))
        }
        is_diffusers = any(module.space == "diffusers" for module in file.modules)
        return LoraFile(path, ratio, adapters, file.metadata, is_diffusers)


def _adapter(module: Module, title: str) -> Adapter:
    tensors = module.tensors
    for kind, tensor in tensors.items():
        if kind not in LORA_TENSORS | {WEIGHT_CHANGE, BIAS_CHANGE}:
            raise UserError(
                f"{title}: {module.name}.{kind}: LoRA, DoRA and whole differences (diff, diff_b) can be merged, "
                "but no LoHa, LoKr, OFT or the like"
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(
                f"{title}: {module.name}: holds values that are not finite; the training that made it failed"
            )
    low_rank = None
    if DOWN in tensors:
        down, up = tensors[DOWN], tensors[UP]
        if down.dim() != 2 or up.dim() != 2:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise UserError(f"{title}: {module.name}: down and up are {shapes}, which make no linear layer")
        low_rank = LowRank(down, up, module.strength, tensors.get(DORA))
    elif not {WEIGHT_CHANGE, BIAS_CHANGE} & tensors.keys():
        raise UserError(f"{title}: {module.name}: has neither lora_down nor lora_up; the file is incomplete")
    return Adapter(module.part, low_rank, tensors.get(WEIGHT_CHANGE), tensors.get(BIAS_CHANGE))


# ---- into a model ----

#: tensor's name -> its changes, full or low-rank, with their ratios
Changes = Mapping[str, Sequence[tuple[LowRank | Tensor, float]]]


def find_changes(
    part: ModelPart, shapes: Mapping[str, tuple[int, ...]], files: Sequence[LoraFile], source: object
) -> Changes:
    """Find the changes of the files in one model.

    Args:
        shapes: names and shapes of the model's tensors, of the file ``source``.

    Raises:
        UserError: an adapter's module is not in the model or has another shape, or no adapter is for the model.
    """
    keys = part.lora_keys(shapes, source)
    found: dict[str, list[tuple[LowRank | Tensor, float]]] = defaultdict(list)
    for file in files:
        for name, adapter in file.adapters.items():
            if adapter.part is not part.part:
                continue
            if name not in keys:
                raise UserError(
                    f"{file.path}: {name} has no place in {source}{did_you_mean(name, keys)}; "
                    "was the LoRA made for another model?"
                )
            weight = keys[name]
            for change, key in (
                (adapter.low_rank, weight),
                (adapter.weight, weight),
                (adapter.bias, f"{weight.removesuffix('weight')}bias"),
            ):
                if change is None:
                    continue
                if tuple(change.shape) != shapes.get(key):
                    there = f"is {list(shapes[key])}" if key in shapes else "is none"
                    raise UserError(
                        f"{file.path}: {name} changes {key} of {list(change.shape)}, in {source} there {there}; "
                        "the LoRA was made for another model"
                    )
                found[key].append((change, file.ratio))
    if not found:
        raise UserError(f"{source}: none of the LoRA files has modules of the {part.title} ({part.part.kohya[0]}...)")
    return found


def merging_reader(
    read: Callable[[str], Tensor],
    changes: Changes,
    *,
    loading_device: torch.device,
    working_device: torch.device,
    precision: torch.dtype,
    save_dtype: torch.dtype,
) -> Callable[[str], Tensor]:
    """Return ``read`` with the changes merged: W + sum of ratio * (alpha / rank) up @ down.

    A changed weight is computed some rows at a time, so that only its result exists as a whole. A DoRA, whose
    magnitudes need the whole weight, needs a few copies.

    Args:
        read: gives a model's tensor by its name, on the host.
        loading_device: device that it is loaded to.
        working_device: device of the computation, in ``precision``.
        save_dtype: of the changed ones.
    """

    def produce(name: str) -> Tensor:
        weight = read(name).to(loading_device)
        if name not in changes:
            return weight
        plain, whole = [], []
        for change, ratio in changes[name]:
            if isinstance(change, Tensor):
                whole.append((change, ratio))
            elif change.dora_scale is not None:
                whole.append((_dora_change(weight.to(working_device), change), ratio))
            else:
                up, down = (t.to(device=working_device, dtype=precision) for t in (change.up, change.down))
                plain.append((up, down, ratio * change.scale))
        merged = torch.empty(weight.shape, dtype=save_dtype)
        step = max(1, _CHUNK // weight.shape[-1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            part = weight[rows].to(device=working_device, dtype=precision, copy=True)
            for up, down, strength in plain:
                part.addmm_(up[rows], down, alpha=strength)
            for change, ratio in whole:
                part += change[rows].to(device=working_device, dtype=precision) * ratio
            merged[rows] = cast(part, save_dtype).cpu()
        return merged

    return produce


def _dora_change(weight: Tensor, low_rank: LowRank) -> Tensor:
    """Return W' - W of a DoRA, float32, see ``networks/dora.py``, for a weight (out, in) before any merging."""
    assert low_rank.dora_scale is not None
    base = weight.float()
    up, down, magnitudes = (
        t.to(device=base.device, dtype=torch.float32) for t in (low_rank.up, low_rank.down, low_rank.dora_scale)
    )
    changed = torch.addmm(base, up, down, alpha=low_rank.scale)
    # one magnitude for each input, (1, in), or for each output, (out, 1)
    norms = torch.linalg.vector_norm(changed, dim=1 if magnitudes.shape[0] == base.shape[0] else 0, keepdim=True)
    return changed * (magnitudes / norms.clamp(min=_EPS)) - base


# ---- with each other ----


def combine(
    files: Sequence[LoraFile], *, concat: bool, shuffle: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Combine several LoRAs into one, as the tensors of a file.

    With ``concat`` the ranks are concatenated: the change is exactly the sum of ratio times each file's. Without it,
    down matrices are added to down matrices and up to up, which keeps the rank. Each file's own product has its ratio,
    but products of one file's up with another's down come in as well.

    Args:
        shuffle: permute the ranks of a module, the same way on both sides and in each run, so that random ranks are
            added; a file's own change stays the same.
        dtype: to compute in.

    Raises:
        UserError: a module has different ranks, without ``concat``, or different shapes; a DoRA or a whole difference.
    """
    by_module: dict[str, list[tuple[int, LoraFile, LowRank]]] = defaultdict(list)
    for number, file in enumerate(files):
        for name, adapter in file.adapters.items():
            low_rank = adapter.low_rank
            is_plain = adapter.weight is None and adapter.bias is None
            if low_rank is None or low_rank.dora_scale is not None or not is_plain:
                what = "whole differences" if low_rank is None or not is_plain else "a DoRA"
                raise UserError(f"{file.path}: {what} ({name}), which cannot be merged with others; merge into a model")
            by_module[name].append((number, file, low_rank))
    found: dict[str, Tensor] = {}
    for name, members in by_module.items():
        _check_together(name, members, concat)
        downs, ups = [], []
        base = members[0][2]
        # the strength of the merged file's tensors; a single file at ratio 1 keeps its values
        scale = base.scale or 1.0
        for number, file, low_rank in members:
            factor = file.ratio * low_rank.scale / scale
            # the root of the strength on each side; the sign on one side only
            root = math.sqrt(abs(factor))
            down = low_rank.down.to(device=device, dtype=dtype) * math.copysign(root, factor)
            up = low_rank.up.to(device=device, dtype=dtype) * root
            if shuffle:
                order = permutation(low_rank.rank, 0, "merge LoRA ranks", name, number)
                down, up = down[order], up[:, order]
            downs.append(down)
            ups.append(up)
        down = torch.cat(downs) if concat else torch.stack(downs).sum(0)
        found[f"{name}.lora_down.weight"] = down.cpu()
        found[f"{name}.lora_up.weight"] = (torch.cat(ups, dim=1) if concat else torch.stack(ups).sum(0)).cpu()
        found[f"{name}.alpha"] = torch.tensor(scale * down.shape[0])
    return found


def _check_together(name: str, members: Sequence[tuple[int, LoraFile, LowRank]], concat: bool) -> None:
    _, first_file, first = members[0]
    for _, file, other in members[1:]:
        if other.shape != first.shape:
            raise UserError(
                f"{file.path}: {name} changes a weight of another shape than in {first_file.path}; "
                "the two were made for different models"
            )
        if other.rank != first.rank and not concat:
            raise UserError(
                f"{file.path}: {name} has rank {other.rank}, in {first_file.path} it is {first.rank}; ranks that "
                "differ cannot be added, give --concat"
            )
