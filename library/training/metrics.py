"""Metrics of a step (loss, gradient norm) brought to the host without stopping the device.

Reading a device tensor with ``.item()`` waits for all queued work. Here each step's metrics are packed
into one small tensor, copied to pinned memory behind the step's own work, and read one step later, when
the copy has long been done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class StepMetrics:
    """Host-side metrics of one optimizer step, averaged over its batches."""

    step: int
    values: dict[str, float]


@dataclass
class _Pending:
    step: int
    names: tuple[str, ...]
    host: Tensor
    measured: Mapping[str, float]
    ready: torch.cuda.Event | None


class DeferredMetrics:
    """A queue of metrics on their way to the host."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def push(self, step: int, metrics: dict[str, Tensor], measured: Mapping[str, float] | None = None) -> None:
        """Start the copy of 0-dim tensors that live on one device; what was ``measured`` on the host goes with them."""
        packed = torch.stack([value.detach().float() for value in metrics.values()])
        ready = None
        if packed.is_cuda:
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        else:
            host = packed
        self._pending.append(_Pending(step, tuple(metrics), host, measured or {}, ready))

    def pop(self, *, keep: int = 1) -> list[StepMetrics]:
        """Take out all but the newest ``keep`` entries; ``keep=0`` waits for the device."""
        taken = []
        while len(self._pending) > keep:
            entry = self._pending.popleft()
            if entry.ready is not None:
                entry.ready.synchronize()
            values = dict(zip(entry.names, entry.host.tolist(), strict=True))
            taken.append(StepMetrics(entry.step, values | dict(entry.measured)))
        return taken


class StepTimes:
    """Seconds from the end of one step to the end of the next, and how many of them passed in waiting for data.

    Taken by the host's clock, so the device is not asked; where it is the slower one the host is held up by it at the
    metrics of the step before, and both are those of the device too.
    """

    def __init__(self) -> None:
        self._ended = time.perf_counter()
        self._waited = 0.0

    def waiting(self, batches: Iterator[T]) -> T:
        """The next batch; the time that it takes to come counts."""
        began = time.perf_counter()
        try:
            return next(batches)
        finally:
            self._waited += time.perf_counter() - began

    def end_step(self) -> dict[str, float]:
        """``time/step`` and, as a part of it, ``time/data_wait``."""
        now = time.perf_counter()
        times = {"time/step": now - self._ended, "time/data_wait": self._waited}
        self._ended, self._waited = now, 0.0
        return times


class DataWait:
    """Which share of the time between steps passed in waiting for data, from the second step of this process on."""

    def __init__(self) -> None:
        self._steps = 0
        self._total = self._waited = 0.0

    def add(self, times: Mapping[str, float]) -> None:
        """The times of one step, as ``StepTimes`` gives them."""
        self._steps += 1
        if self._steps > 1:
            self._total += times["time/step"]
            self._waited += times["time/data_wait"]

    @property
    def share(self) -> float | None:
        return self._waited / self._total if self._total > 0 else None


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
