"""Copies between host and device beside the computation, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: types of devices with streams
_WITH_STREAMS = ("cuda", "xpu")


class Transfers:
    """A queue of copies. On a device without streams each copy is made at once.

    Args:
        device: that the computation runs on.
        streams: the module of torch that has the device's ``Stream``, ``Event``, ``stream`` and ``current_stream``; by
            default that of its type.
    """

    def __init__(self, device: torch.device, *, streams: Any = None) -> None:
        if streams is None and device.type in _WITH_STREAMS:
            streams = getattr(torch, device.type)
        self._device, self._module = device, streams
        self._stream = streams.Stream(device) if streams is not None else None

    def host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return memory on the host, pinned where copies need that to run beside the computation."""
        return torch.empty(size, dtype=dtype, pin_memory=self._stream is not None)

    def host_like(self, tensor: Tensor) -> Tensor:
        """Return such memory with the shape of a tensor."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: Iterable[Any] = ()) -> Any:
        """Copy each (target, source) after all queued work of the device, and after events; returns an event."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(self._module.current_stream(self._device))
        for event in after:
            if event is not None:
                self._stream.wait_event(event)
        with self._module.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = self._module.Event()
            event.record(self._stream)
        return event

    def hold(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor on the device from being used again, once it is freed, before its copies are made."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def wait(self, event: Any) -> None:
        """Make the computation wait for a copy, but not the host."""
        if event is not None:
            self._module.current_stream(self._device).wait_event(event)

    def settle(self) -> None:
        """Make the host wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()
