"""LoRA files merged into the weights of a model, and with each other; by names and shapes, without building models."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, did_you_mean
from library.files.precisions import cast
from library.files.safetensors_io import read_header
from library.randomness import permutation
from networks.flux_lora_names import LowRank, read_modules
from networks.model_keys import ModelPart, part_of, refuse_scaled
from networks.weights import read_weights

logger = logging.getLogger(__name__)

#: numbers of a weight that are merged at a time
_CHUNK = 1 << 22
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class LoraFile:
    """One file to merge.

    Attributes:
        ratio: the strength it is merged with.
        modules: by published names.
        is_diffusers: whether the file has diffusers' names.
    """

    path: Path
    ratio: float
    modules: Mapping[str, LowRank]
    metadata: Mapping[str, str]
    is_diffusers: bool

    @staticmethod
    def open(path: Path, ratio: float) -> LoraFile:
        """Raises: UserError for a file that is missing, damaged, or no LoRA."""
        modules, is_diffusers = read_modules(read_weights(path), str(path))
        metadata = read_header(path).metadata if path.suffix == ".safetensors" else {}
        return LoraFile(path, ratio, modules, metadata, is_diffusers)


# ---- into a model ----

#: weight's name -> what changes it, and how much
Changes = Mapping[str, Sequence[tuple[LowRank, float]]]


def find_changes(
    part: ModelPart, shapes: Mapping[str, tuple[int, ...]], files: Sequence[LoraFile], source: object
) -> Changes:
    """What the files change in one model.

    Args:
        shapes: names and shapes of the model's tensors, of the file ``source``.

    Raises:
        UserError: an adapter has no place in the model or another shape, or there is none for it.
    """
    refuse_scaled(shapes, source)
    keys = part.lora_keys(shapes)
    changes: dict[str, list[tuple[LowRank, float]]] = defaultdict(list)
    for file in files:
        for name, low_rank in file.modules.items():
            if part_of(name) is not part:
                continue
            if name not in keys:
                raise UserError(
                    f"{file.path}: {name} has no place in {source}{did_you_mean(name, keys)}; "
                    "was the LoRA made for another model?"
                )
            own, needed = (low_rank.up.shape[0], low_rank.down.shape[1]), shapes[keys[name]]
            if own != needed:
                raise UserError(
                    f"{file.path}: {name} changes a weight of {list(own)}, in {source} it is {list(needed)}; "
                    "the LoRA was made for another model"
                )
            changes[keys[name]].append((low_rank, file.ratio))
    if not changes:
        raise UserError(f"{source}: none of the LoRA files has modules of the {part.title} ({part.prefix}_...)")
    return changes


def merging_reader(
    read: Callable[[str], Tensor],
    changes: Changes,
    *,
    loading_device: torch.device,
    working_device: torch.device,
    precision: torch.dtype,
    save_dtype: torch.dtype,
) -> Callable[[str], Tensor]:
    """``read`` with the changes in the weights: W + sum of ratio * (alpha / rank) up @ down.

    A changed weight is made some rows at a time, so that only its result exists as a whole; with a DoRA, whose
    magnitudes need the whole weight, a few copies of it do.

    Args:
        read: gives a model's tensor by its name, on the host.
        loading_device: where it is put first.
        working_device: where the changed ones are computed, in ``precision``.
        save_dtype: of the changed ones.
    """

    def produce(name: str) -> Tensor:
        weight = read(name).to(loading_device)
        if name not in changes:
            return weight
        plain, doras = [], []
        for low_rank, ratio in changes[name]:
            up, down = (t.to(device=working_device, dtype=precision) for t in (low_rank.up, low_rank.down))
            if low_rank.dora_scale is None:
                plain.append((up, down, ratio * low_rank.scale))
            else:
                doras.append(ratio * _dora_change(weight.to(working_device), low_rank))
        merged = torch.empty(weight.shape, dtype=save_dtype)
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            part = weight[rows].to(device=working_device, dtype=precision, copy=True)
            for up, down, strength in plain:
                part.addmm_(up[rows], down, alpha=strength)
            for change in doras:
                part += change[rows].to(precision)
            merged[rows] = cast(part, save_dtype).cpu()
        return merged

    return produce


def _dora_change(weight: Tensor, low_rank: LowRank) -> Tensor:
    """W' - W of a DoRA, float32, as ``networks/dora.py`` defines it, for a weight (out, in) before any merging."""
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
    """One LoRA of several, as the tensors of a file.

    With ``concat`` the ranks are put side by side: the change is exactly the sum of ratio times each file's. Without,
    downs are added to downs and ups to ups, which keeps the rank; each file's own product comes out at its ratio, but
    products of one file's up with another's down come in as well.

    Args:
        shuffle: exchange the ranks of a module, the same way on both sides, so that which of them are added is random
            (and the same in each run); a file's own change stays what it was.
        dtype: to compute in.

    Raises:
        UserError: a module has different ranks, without ``concat``, or different shapes; a DoRA.
    """
    by_module: dict[str, list[tuple[int, LoraFile, LowRank]]] = defaultdict(list)
    for number, file in enumerate(files):
        for name, low_rank in file.modules.items():
            if low_rank.dora_scale is not None:
                raise UserError(f"{file.path}: a DoRA ({name}), which cannot be merged with others; merge into a model")
            by_module[name].append((number, file, low_rank))
    found: dict[str, Tensor] = {}
    for name, members in by_module.items():
        _check_together(name, members, concat)
        downs, ups = [], []
        base = members[0][2]
        # the strength of the merged file's tensors, so that a single file at ratio 1 keeps its numbers
        scale = base.scale or 1.0
        for number, file, low_rank in members:
            factor = file.ratio * low_rank.scale / scale
            # half of the strength on each side; the sign can stand on one only
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
        if (other.up.shape[0], other.down.shape[1]) != (first.up.shape[0], first.down.shape[1]):
            raise UserError(
                f"{file.path}: {name} changes a weight of another shape than in {first_file.path}; "
                "the two were made for different models"
            )
        if other.rank != first.rank and not concat:
            raise UserError(
                f"{file.path}: {name} has rank {other.rank}, in {first_file.path} it is {first.rank}; ranks that "
                "differ cannot be added, give --concat"
            )
