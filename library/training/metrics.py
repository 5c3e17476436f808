"""Bring the metrics of a step (loss, gradient norm) to the host without stopping the device.

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
        """Start the copy of 0-dim tensors on one device; ``measured`` are values from the host."""
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
        """Remove and return all but the newest ``keep`` entries; ``keep=0`` waits for the device."""
        taken = []
        while len(self._pending) > keep:
            entry = self._pending.popleft()
            if entry.ready is not None:
                entry.ready.synchronize()
            values = dict(zip(entry.names, entry.host.tolist(), strict=True))
            taken.append(StepMetrics(entry.step, values | dict(entry.measured)))
        return taken


class StepTimes:
    """Measures seconds from the end of one step to the end of the next, and the part spent waiting for data.

    It uses the host's clock, so nothing waits for the device. If the device is slower, the host waits for the metrics
    of the previous step, so both times are the device's too.
    """

    def __init__(self) -> None:
        self._ended = time.perf_counter()
        self._waited = 0.0

    def waiting(self, batches: Iterator[T]) -> T:
        """Return the next batch, and count the time until it arrives."""
        began = time.perf_counter()
        try:
            return next(batches)
        finally:
            self._waited += time.perf_counter() - began

    def end_step(self) -> dict[str, float]:
        """Return ``time/step`` and, as a part of it, ``time/data_wait``."""
        now = time.perf_counter()
        times = {"time/step": now - self._ended, "time/data_wait": self._waited}
        self._ended, self._waited = now, 0.0
        return times


class DataWait:
    """The fraction of the time between steps that was spent waiting for data, from the second step of this process
    on."""

    def __init__(self) -> None:
        self._steps = 0
        self._total = self._waited = 0.0

    def add(self, times: Mapping[str, float]) -> None:
        """Add the times of one step from ``StepTimes``."""
        self._steps += 1
        if self._steps > 1:
            self._total += times["time/step"]
            self._waited += times["time/data_wait"]

    @property
    def share(self) -> float | None:
        return self._waited / self._total if self._total > 0 else None


class LossAverage:
    """The mean loss over as many steps as an epoch has, the published ``loss/average``."""

    def __init__(self, window: int) -> None:
        self._window: deque[float] = deque(maxlen=max(1, window))

    def add(self, loss: float) -> None:
        self._window.append(loss)

    @property
    def mean(self) -> float:
        return sum(self._window) / len(self._window) if self._window else float("nan")

    def state(self) -> list[float]:
        """Return what a resumed run needs for the same average."""
        return list(self._window)

    def restore(self, losses: list[float]) -> None:
        self._window.extend(losses)
