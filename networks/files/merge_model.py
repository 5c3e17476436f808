"""Merge adapter files into the weights of a model, by names and shapes, without building the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from library.architectures.adapters import AdapterNaming, WeightPlace
from library.architectures.common.recognise import refuse_scaled
from library.errors import UserError, did_you_mean
from library.files.precisions import cast
from networks.files.adapter_file import BIAS_CHANGE, DOWN, UP, Module
from networks.files.deltas import change_of, change_shape
from networks.files.lora_file import LoraFile, is_plain

#: elements of a weight that are merged at a time
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Change:
    """The change of one tensor of the model by one module of a file."""

    module: Module
    strength: float
    place: WeightPlace
    is_bias: bool = False

    @property
    def is_by_rows(self) -> bool:
        """Whether it can be computed a few rows at a time: a plain LoRA of a whole linear layer."""
        return is_plain(self.module) and not self.is_bias and self.place.rows is None and not self.place.transposed


#: name of a tensor -> its changes
Changes = Mapping[str, Sequence[Change]]


def find_changes(
    part: AdapterNaming, shapes: Mapping[str, tuple[int, ...]], files: Sequence[LoraFile], source: object
) -> dict[str, list[Change]]:
    """Return what the files change in one model.

    Args:
        shapes: names and shapes of the model's tensors in the file ``source``.

    Returns:
        Empty if no file changes it.

    Raises:
        UserError: an adapter has no place in the model or another shape, or the weights are quantised with scales.
    """
    places = part.places(shapes)
    try:
        refuse_scaled(name for name in shapes if name.startswith(_root(places)))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    found: dict[str, list[Change]] = defaultdict(list)
    for file in files:
        for name, module in file.modules.items():
            if module.part.kohya != part.kohya:
                continue
            place = places.get(name)
            if place is None:
                raise UserError(
                    f"{file.path}: {name} has no place in {source}{did_you_mean(name, places)}; "
                    "was the LoRA made for another model?"
                )
            _check(file, name, module, place, shapes, source)
            strength = file.strength(name)
            if module.tensors.keys() - {BIAS_CHANGE}:
                found[place.name].append(Change(module, strength, place))
            if BIAS_CHANGE in module.tensors:
                found[place.bias].append(Change(module, strength, place, is_bias=True))
    return dict(found)


def _root(places: Mapping[str, WeightPlace]) -> str:
    """Return the prefix of all names of a model in its file."""
    return commonprefix([place.name for place in places.values()]).rpartition(".")[0]


def _check(
    file: LoraFile, name: str, module: Module, place: WeightPlace, shapes: Mapping[str, tuple[int, ...]], source: object
) -> None:
    """Raise UserError if a change does not fit the weight or the bias."""
    try:
        shape = change_shape(module, place.shape)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    # a 1x1 convolution and a linear layer have the same elements
    if shape is not None and (
        shape[0] != place.shape[0] or torch.Size(shape).numel() != torch.Size(place.shape).numel()
    ):
        raise UserError(
            f"{file.path}: {name} changes {place.name} of {list(shape)}, in {source} there is {list(place.shape)}; "
            "the LoRA was made for another model"
        )
    if BIAS_CHANGE in module.tensors:
        bias, there = module.tensors[BIAS_CHANGE], shapes.get(place.bias)
        if there is None or (bias.shape[0],) != ((place.shape[0],) if place.rows is not None else there):
            what = "is none" if there is None else f"is {list(there)}"
            raise UserError(
                f"{file.path}: {name} changes {place.bias} of {list(bias.shape)}, in {source} there {what}; "
                "the LoRA was made for another model"
            )


def merging_reader(
    read: Callable[[str], Tensor],
    changes: Changes,
    *,
    loading_device: torch.device,
    working_device: torch.device,
    precision: torch.dtype,
    save_dtype: torch.dtype | None,
) -> Callable[[str], Tensor]:
    """Return ``read`` with the changes in the weights: W + sum of strength * change.

    The change of a DoRA or an OFT is that of the original weight, so that the order of the files does not matter. A
    weight with plain LoRAs alone is computed a few rows at a time, so that only the result exists as a whole.

    Args:
        read: returns a tensor of the model by its name, on the host.
        loading_device: where tensors are put first.
        working_device: where changed tensors are computed, in ``precision``.
        save_dtype: of changed tensors; None keeps theirs.
    """

    def produce(name: str) -> Tensor:
        weight = read(name).to(loading_device)
        own = changes.get(name)
        if own is None:
            return weight
        settings = {"device": working_device, "dtype": precision}
        dtype = save_dtype or weight.dtype
        if all(change.is_by_rows for change in own):
            return _by_rows(weight, own, dtype, **settings)
        merged = weight.to(**settings, copy=True)
        for change in own:
            _add(merged, weight.to(**settings), change)
        return cast(merged, dtype).cpu()

    return produce


def _by_rows(
    weight: Tensor, changes: Sequence[Change], save_dtype: torch.dtype, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    factors = []
    for change in changes:
        up, down = (change.module.tensors[kind].flatten(1).to(device=device, dtype=dtype) for kind in (UP, DOWN))
        factors.append((up, down, change.strength * change.module.strength))
    merged = torch.empty(weight.shape, dtype=save_dtype)
    step = max(1, _CHUNK // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        part = weight[rows].to(device=device, dtype=dtype, copy=True)
        for up, down, strength in factors:
            part.flatten(1).addmm_(up[rows], down, alpha=strength)
        merged[rows] = cast(part, save_dtype).cpu()
    return merged


def _add(merged: Tensor, weight: Tensor, change: Change) -> None:
    """Add one change, computed from the original weight, to the tensor in place."""
    place = change.place
    rows = slice(None) if place.rows is None else place.rows
    if change.is_bias:
        merged[rows] += change.module.tensors[BIAS_CHANGE].to(merged) * change.strength
        return
    own = (weight.T if place.transposed else weight)[rows].reshape(place.shape)
    delta = change_of(change.module, own, dtype=merged.dtype)
    assert delta is not None
    target = (merged.T if place.transposed else merged)[rows]
    target += (delta * change.strength).reshape(target.shape)
