"""Load optimizer states as they were saved, to the device of the updates, laid out as the parameters are now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from library.optim.layout import laid_out_as


def keep_state_dtypes(optimizer: torch.optim.Optimizer, device: torch.device | None = None) -> None:
    """Make ``load_state_dict`` keep the dtype that every tensor was saved in; torch casts all to the parameter's.

    The memory format is the parameter's: a state of whole weights has another one than a state of shards.

    Args:
        device: of the updates, if parameters may be on the host between them; torch loads the state to the parameter's.
    """
    load = optimizer.load_state_dict

    def load_state_dict(state: Mapping[str, Any]) -> None:
        load(dict(state))
        for parameter, saved in _saved_states(optimizer, state):
            current = optimizer.state[parameter]
            for name, value in saved.items():
                if name in current:
                    current[name] = _in_place(parameter, _as_saved(current[name], value))
            if device is not None and parameter.device != device:
                optimizer.state[parameter] = {name: _on(device, value) for name, value in current.items()}

    optimizer.load_state_dict = load_state_dict


def _in_place(parameter: Tensor, value: Any) -> Any:
    """Return a loaded value; one of the parameter's shape lies as the parameter does."""
    is_alike = isinstance(value, Tensor) and value.shape == parameter.shape
    return laid_out_as(parameter, value) if is_alike else value


def _on(device: torch.device, value: Any) -> Any:
    """Return a loaded value on the device; counters stay where they are."""
    return value.to(device) if isinstance(value, Tensor) and value.dim() else value


def _as_saved(current: Any, saved: Any) -> Any:
    """Return the loaded state, with the saved tensors where loading changed the dtype."""
    if isinstance(saved, Tensor) and isinstance(current, Tensor):
        same = current.dtype == saved.dtype
        return current if same else saved.detach().to(device=current.device, copy=True)
    if isinstance(saved, dict) and isinstance(current, dict):
        return {name: _as_saved(value, saved.get(name)) for name, value in current.items()}
    if type(saved) is type(current) and type(saved) in (list, tuple) and len(saved) == len(current):
        return type(saved)(_as_saved(one, other) for one, other in zip(current, saved, strict=True))
    return current


def _saved_states(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if isinstance(saved := state["state"].get(number), Mapping):
            yield parameter, saved
