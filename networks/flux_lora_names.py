"""LoRA files for FLUX.1 and Chroma in diffusers' names, read as the published ones.

The published layout joins layers that diffusers keeps apart (q, k, v; in single blocks the MLP too), so several of
diffusers' modules make one published module:

    down (R, in) = the parts' downs, stacked,        up (out, R) = the parts' ups, block by block,

with R the sum of the parts' ranks and zeros elsewhere. Parts that share one down, as files have that were converted
from the published layout, keep their rank: up is then their ups, stacked.

Read are ``transformer.x.lora_A.weight`` (diffusers, PEFT, AI-toolkit), ``lora_transformer_x.lora_down.weight``, for
text encoders ``text_encoder.`` and ``text_encoder_2.``, and published paths with dots, ``diffusion_model.x``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from library.architectures.flux.diffusers_layout import Variant, module_pairs
from library.errors import UserError
from networks.file_names import split_name
from networks.weights import refuse_misfits

#: rows of the MLP in linear1 for each row of q; the same in every published model
_MLP_RATIO = 4
_ENCODERS = {"text_encoder.": ("lora_te1", "text_model."), "text_encoder_2.": ("lora_te3", "")}


@dataclass(frozen=True)
class LowRank:
    """The change of one linear layer: (alpha / rank) up @ down.

    Attributes:
        down: (rank, in).
        up: (out, rank).
        dora_scale: magnitudes of a DoRA, (1, in) or (out, 1); see ``networks/dora.py``.
    """

    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Place(NamedTuple):
    """Where a module of a file belongs: part ``index`` of the ``count`` parts of a published module."""

    lora_name: str
    index: int = 0
    count: int = 1
    halves_swapped: bool = False
    is_diffusers: bool = False


def read_modules(weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, LowRank], bool]:
    """A LoRA file's modules by published names, and whether it has diffusers' names.

    Raises:
        UserError: no LoRA; tensors that are unknown, missing, not finite or of shapes that do not fit.
    """
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in weights.items():
        if split := split_name(key):
            by_module[split[0]][split[1]] = tensor
        else:
            unknown.append(key)
    if not any("lora_down.weight" in tensors for tensors in by_module.values()):
        refuse_misfits((), (), weights, source, "a LoRA")
    if unknown:
        raise UserError(f"{source}: {unknown[0]} is no tensor of a LoRA; parts of another kind cannot be merged")
    places = _places(by_module)
    parts: dict[str, dict[int, LowRank]] = defaultdict(dict)
    shape_of: dict[str, _Place] = {}
    for module, tensors in by_module.items():
        place = places.get(module) or _text_encoder_place(module)
        low_rank = _low_rank(tensors, f"{source}: {module}")
        if place.index in parts[place.lora_name]:
            raise UserError(f"{source}: holds {place.lora_name} twice, once as {module}; the names are mixed up")
        parts[place.lora_name][place.index] = _swap_halves(low_rank) if place.halves_swapped else low_rank
        shape_of[place.lora_name] = place
    modules = {
        name: found[0] if shape_of[name].count == 1 else _join(found, shape_of[name].count, f"{source}: {name}")
        for name, found in parts.items()
    }
    return modules, any(place.is_diffusers for place in shape_of.values())


def _places(modules: Mapping[str, object]) -> dict[str, _Place]:
    """Every name of a transformer's module that a file of these names could have -> its place."""
    numbers = [int(found[1]) for name in modules if (found := re.search(r"blocks[._](\d+)[._]", name))]
    blocks = 1 + max(numbers, default=-1)
    # the tables of dev hold those of schnell and of Chroma's blocks
    places: dict[str, _Place] = {}
    for pair in module_pairs(Variant(False, True, blocks, blocks)):
        name = f"lora_unet_{pair.published.replace('.', '_')}"
        for spelling in (name, f"diffusion_model.{pair.published}", f"transformer.{pair.published}", pair.published):
            places[spelling] = _Place(name)
        for index, part in enumerate(pair.parts):
            place = _Place(name, index, len(pair.parts), pair.halves_swapped, True)
            underscored = part.replace(".", "_")
            for spelling in (
                f"transformer.{part}",
                part,
                f"lora_transformer_{underscored}",
                f"lora_unet_{underscored}",
            ):
                places[spelling] = place
    return places


def _text_encoder_place(module: str) -> _Place:
    for root, (prefix, level) in _ENCODERS.items():
        if module.startswith(root):
            path = level + module.removeprefix(root).removeprefix(level)
            return _Place(f"{prefix}_{path.replace('.', '_')}", is_diffusers=True)
    return _Place(module)  # published, or of another model


def _low_rank(tensors: Mapping[str, Tensor], title: str) -> LowRank:
    for needed in ("lora_down.weight", "lora_up.weight"):
        if needed not in tensors:
            raise UserError(f"{title}: has no {needed}; the file is incomplete")
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise UserError(f"{title}: down and up are {shapes}, which make no linear layer of FLUX.1 or Chroma")
    for tensor in tensors.values():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"{title}: holds values that are not finite; the training that made it went wrong")
    alpha = tensors.get("alpha")
    return LowRank(down, up, float(down.shape[0] if alpha is None else alpha), tensors.get("dora_scale"))


def _swap_halves(part: LowRank) -> LowRank:
    first, second = part.up.chunk(2)
    return LowRank(part.down, torch.cat([second, first]), part.alpha, part.dora_scale)


def _join(parts: Mapping[int, LowRank], count: int, title: str) -> LowRank:
    """One module of several whose outputs are joined."""
    present = [parts[index] for index in sorted(parts)]
    if any(part.dora_scale is not None for part in present):
        raise UserError(f"{title}: a DoRA in diffusers' names, whose parts cannot be joined; train or convert it again")
    if len({part.down.shape[1] for part in present}) > 1:
        raise UserError(f"{title}: its parts have inputs of different widths; the file is damaged")
    rows = _rows(parts, count)
    scales = {part.scale for part in present}
    dtype = present[0].up.dtype
    ends = torch.tensor([0, *rows]).cumsum(0).tolist()
    first = present[0]
    if len(scales) == 1 and all(torch.equal(part.down, first.down) for part in present):
        up = torch.zeros(ends[-1], first.rank, dtype=dtype)
        for index, part in parts.items():
            up[ends[index] : ends[index + 1]] = part.up
        return LowRank(first.down, up, first.alpha)
    rank = sum(part.rank for part in present)
    up = torch.zeros(ends[-1], rank, dtype=dtype)
    column = 0
    for index in sorted(parts):
        part = parts[index]
        own = part.up if len(scales) == 1 else part.up * part.scale
        up[ends[index] : ends[index + 1], column : column + part.rank] = own
        column += part.rank
    return LowRank(torch.cat([part.down for part in present]), up, rank * (scales.pop() if len(scales) == 1 else 1.0))


def _rows(parts: Mapping[int, LowRank], count: int) -> list[int]:
    """Rows of each part, of those that the file leaves out too."""
    channels = next((parts[index].up.shape[0] for index in range(3) if index in parts), None)
    if channels is None:
        channels = parts[3].up.shape[0] // _MLP_RATIO
    rows = [channels] * 3 + [channels * _MLP_RATIO] * (count - 3)
    return [parts[index].up.shape[0] if index in parts else rows[index] for index in range(count)]
