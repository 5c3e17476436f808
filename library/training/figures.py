"""Figures of a step (loss, gradient norm) brought to the host without stopping the device.

Reading a device tensor with ``.item()`` waits for all queued work. Here each step's figures are packed
into one small tensor, copied to pinned memory behind the step's own work, and read one step later, when
the copy has long been done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepFigures:
    """Host-side figures of one optimizer step, averaged over its batches."""

    step: int
    values: dict[str, float]


@dataclass
class _Pending:
    step: int
    names: tuple[str, ...]
    host: Tensor
    ready: torch.cuda.Event | None


class DeferredFigures:
    """A queue of figures on their way to the host."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def push(self, step: int, figures: dict[str, Tensor]) -> None:
        """Start the copy of 0-dim tensors that live on one device."""
        packed = torch.stack([value.detach().float() for value in figures.values()])
        ready = None
        if packed.is_cuda:
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        else:
            host = packed
        self._pending.append(_Pending(step, tuple(figures), host, ready))

    def pop(self, *, keep: int = 1) -> list[StepFigures]:
        """Take out all but the newest ``keep`` entries; ``keep=0`` waits for the device."""
        taken = []
        while len(self._pending) > keep:
            entry = self._pending.popleft()
            if entry.ready is not None:
                entry.ready.synchronize()
            taken.append(StepFigures(entry.step, dict(zip(entry.names, entry.host.tolist(), strict=True))))
        return taken


class LossAverage:
    """Mean loss over the steps of the last epoch's length, the published ``loss/average``."""

    def __init__(self, window: int) -> None:
        self._window: deque[float] = deque(maxlen=max(1, window))

    def add(self, loss: float) -> None:
        self._window.append(loss)

    @property
    def mean(self) -> float:
        return sum(self._window) / len(self._window) if self._window else float("nan")

    def state(self) -> list[float]:
        """What a resumed run needs to show the same average."""
        return list(self._window)

    def restore(self, losses: list[float]) -> None:
        self._window.extend(losses)
