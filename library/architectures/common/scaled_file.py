"""Weight files in fp8 with scales beside the numbers, as ComfyUI and others publish them.

A weight ``x.weight`` of e4m3 or e5m2 numbers has ``x.scale_weight`` or ``x.weight_scale``: one scale, one for each
output channel, or one for each block of inputs (out, in / block, 1). Scales of inputs serve other programs' products in
fp8 and are left out, as are marks of the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.architectures.common.tensor_files import Shapes, WeightFile
from library.errors import UserError
from library.memory.stored_layers import PUBLISHED_SCALE

_WEIGHT = "weight"
_SCALES = ("scale_weight", "weight_scale")
_FORMAT = "comfy_quant"
#: last words of names that are left out
_UNUSED = ("scaled_fp8", "scale_input", "input_scale", "scale_output", _FORMAT)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ScaledFile(WeightFile):
    """Weights in fp8, read as float32 numbers. The scale of a tensor's rows is its attribute ``published_scale``."""

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]
    inner: Any = field(repr=False)  # the file as it is
    scales: Mapping[str, str] = field(repr=False)  # name of a weight -> name of its scale
    mapped: bool = True

    @property
    def files(self) -> set[Path]:
        return self.inner.files

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        with self.inner.opened() as read_inner:

            def read(name: str) -> Tensor:
                tensor = read_inner(name)
                return tensor if name not in self.scales else with_scale(tensor, read_inner(self.scales[name]).float())

            yield read


def with_scale(numbers: Tensor, scale: Tensor) -> Tensor:
    """Return numbers (out, in) times their scale, float32, with the scale as an attribute where rows have one each."""
    exact = numbers.float()
    if scale.numel() in (1, len(exact)):
        weight = exact * scale.reshape(-1, *(1,) * (exact.dim() - 1))
        if numbers.dtype == torch.float8_e4m3fn:  # storing it again gives the same numbers
            setattr(weight, PUBLISHED_SCALE, scale)
        return weight
    # (out, blocks, block) * (out, blocks, 1)
    return (exact.unflatten(1, (scale.shape[1], -1)) * scale.reshape(len(exact), -1, 1)).flatten(1)


def with_plain_numbers(file: WeightFile) -> WeightFile:
    """Return a file whose fp8 numbers are read with the scales beside them; other files are returned as they are.

    Raises:
        UserError: scales that belong to no weight or do not fit it, or another format such as 4 bits.
    """
    found = {name: name.rpartition(".")[2] for name in file.shapes}
    scales = {}
    for name, last in found.items():
        if last not in _SCALES:
            continue
        weight = name.removesuffix(last) + _WEIGHT
        _check(file, weight, name)
        scales[weight] = name
    unused = {name for name, last in found.items() if last in (*_UNUSED, *_SCALES)}
    _check_formats(file, [name for name in unused if found[name] == _FORMAT])
    if not unused:
        return file
    return ScaledFile(
        file.path,
        {name: shape for name, shape in file.shapes.items() if name not in unused},
        {name: dtype for name, dtype in file.dtypes.items() if name not in unused},
        file,
        scales,
        file.mapped,
    )


def _check(file: WeightFile, weight: str, scale: str) -> None:
    shape, own = file.shapes.get(weight), file.shapes[scale]
    if shape is None or file.dtypes.get(weight) not in _FP8:
        raise UserError(
            f"{file.path}: {scale} is a scale, and {weight} has no fp8 numbers for it; give a bf16, fp16 or fp8 file"
        )
    count = 1
    for size in own:
        count *= size
    by_block = len(own) == 3 and len(shape) == 2 and own[0] == shape[0] and own[2] == 1 and shape[1] % own[1] == 0
    if count not in (1, shape[0]) and not by_block:
        raise UserError(
            f"{file.path}: the scale {scale} has shape {list(own)}, which does not fit {weight} of {list(shape)}; "
            "give a bf16 or fp16 file"
        )


def _check_formats(file: WeightFile, names: list[str]) -> None:
    for name, stored in file.read(names) if names else ():
        try:
            kind = json.loads(bytes(stored.flatten().tolist())).get("format")
        except (ValueError, AttributeError):
            kind = None
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise UserError(f"{file.path}: {name} says that weights are in {kind}; give a bf16, fp16 or fp8 file")
