"""The snapshots of ``--on_nan rollback``: weights, optimizer and averages of some steps, in host memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.optim.flat import all_finite
from library.optim.update import Update

#: steps between two snapshots
KEPT_EVERY = 25


@dataclass
class _Copy:
    """Weights, optimizer and averages after a step, on the host."""

    step: int
    parameters: list[Tensor]
    state: dict[Tensor, dict[str, Any]]  # state of the optimizer, by parameter
    groups: list[dict[str, Any]]
    averages: dict[str, Tensor] | None
    finite: Tensor


class KeptState:
    """The last snapshot known to be finite, and a newer one whose step is not checked yet."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._kept: _Copy | None = None
        self._candidate: _Copy | None = None

    def start(self, step: int) -> None:
        """Take the snapshot that the run starts from."""
        if self._kept is None:
            self._kept = self._copy(step)

    def step_ended(self, step: int) -> None:
        if step % KEPT_EVERY == 0:
            self._candidate = self._copy(step)

    def confirm(self, step: int) -> bool:
        """Confirm a finite step that the device has completed; returns whether a newer snapshot is now valid."""
        if self._candidate is None or self._candidate.step > step:
            return False
        candidate, self._candidate = self._candidate, None
        if bool(candidate.finite):  # on the host since the step's metrics are
            self._kept = candidate
            return True
        return False

    def _copy(self, step: int) -> _Copy:
        optimizer = self._update.optimizer
        parameters = [p.detach() for p in self._update.parameters]
        average = self._update.average
        # some optimizers keep other values there, too
        states = {p: state for p, state in optimizer.state.items() if isinstance(p, Tensor) and state}
        tensors = [*parameters, *(v for s in states.values() for v in s.values() if isinstance(v, Tensor))]
        return _Copy(
            step,
            parameters=[_to_host(p) for p in parameters],
            state={p: {name: _to_host(value) for name, value in state.items()} for p, state in states.items()},
            groups=[
                {name: _to_host(value) for name, value in group.items() if name not in ("params", "lr")}
                for group in optimizer.param_groups
            ],
            averages=None if average is None else {n: _to_host(t) for n, t in average.state_dict().items()},
            finite=_to_host(self._update.shards.everywhere(all_finite(tensors))),
        )

    @torch.no_grad()
    def restore(self) -> int:
        """Restore the snapshot, except the learning rates, whose schedule continues."""
        kept, optimizer = self._kept, self._update.optimizer
        assert kept is not None, "the run has started"
        self._candidate = None  # it was taken after the bad step
        for parameter, value in zip(self._update.parameters, kept.parameters, strict=True):
            parameter.copy_(value)
        for parameter in [p for p in optimizer.state if isinstance(p, Tensor) and p not in kept.state]:
            del optimizer.state[parameter]
        for parameter, values in kept.state.items():
            state = optimizer.state[parameter]
            for name in [name for name in state if name not in values]:
                del state[name]
            for name, value in values.items():
                _put(state, name, value)
        for group, values in zip(optimizer.param_groups, kept.groups, strict=True):
            for name, value in values.items():
                _put(group, name, value)
        if kept.averages is not None and self._update.average is not None:
            self._update.average.load_state_dict(kept.averages)
        return kept.step


def _to_host(value: Any) -> Any:
    """Return a copy on the host; of a device tensor behind the queued work, without waiting."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    value = value.detach()
    if not value.is_cuda:
        return value.clone()
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _put(values: dict[str, Any], name: str, kept: Any) -> None:
    """Write in place if possible, because optimizers may have further references to their tensors."""
    now = values.get(name)
    if isinstance(kept, Tensor) and isinstance(now, Tensor) and now.shape == kept.shape:
        now.copy_(kept)
    else:
        values[name] = copy.deepcopy(kept)
