"""Check a state folder beside its manifest: its record, and that its tensors are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError, naming
from library.files.finite import not_finite, some_of
from library.files.safetensors_io import iterate_tensors

_COUNTS = ("current_epoch", "current_step", "origin_step", "origin_epoch")


def problem_of_record(values: Mapping[str, Any]) -> str:
    """Return what is wrong with the values of a ``TrainState``, for a message; empty if nothing is."""
    for name in _COUNTS:
        value = values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return f"{name} is {value!r}, and must be a whole number, 0 or more"
    seed = values.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        return f"seed is {seed!r}, and must be a whole number"
    losses = values.get("losses", [])
    if not isinstance(losses, list) or not all(_is_number(loss) for loss in losses):
        return "losses must be a list of finite numbers"
    written = values.get("written")
    if written is not None and not (isinstance(written, list) and all(isinstance(name, str) for name in written)):
        return "written must be a list of names"
    for name in ("fingerprint", "validation"):
        if not isinstance(values.get(name, {}), dict):
            return f"{name} must be an object"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse_bad_weights(folder: Path) -> None:
    """Raise UserError for weights or averages of a state that are not finite, naming file and tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with naming("--resume", file):
            if bad := not_finite(iterate_tensors(file)):
                raise UserError(f"{file}: {some_of(bad)} holds NaN or infinity; use an older state")


def refuse_bad_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where a loaded optimizer's state of a parameter is not finite."""
    if bad := not_finite(_state_tensors(optimizer)):
        raise UserError(
            f"--resume {folder}: the optimizer's state is damaged: {some_of(bad)} holds NaN or infinity; use an older "
            "state"
        )


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with the shape of their parameter; some optimizers keep values such as "the best so far" as
    infinity."""
    for number, (parameter, values) in enumerate(optimizer.state.items()):
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield f"{name} of parameter {number}", value
