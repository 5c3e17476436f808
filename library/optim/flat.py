"""Many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.files.finite import finite_flag


class Flat:
    """Many tensors as few: one flat tensor per dtype and device, so that a step needs a handful of kernels."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault((tensor.dtype, tensor.device), []).append(index)
        self._groups = list(groups.values())

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A copy of all."""
        return [torch.cat([tensors[i].detach().reshape(-1) for i in group]) for group in self._groups]

    def split(self, flats: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the flat tensors, shaped as ``tensors``."""
        found: list[Tensor] = [torch.empty(0)] * len(tensors)
        for group, flat in zip(self._groups, flats, strict=True):
            parts = flat.split([tensors[i].numel() for i in group])
            for i, part in zip(group, parts, strict=True):
                found[i] = part.view(tensors[i].shape)
        return found

    def write(self, flats: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Write the values from ``read`` back."""
        parts = self.split(flats, tensors)
        with torch.no_grad():
            for group in self._groups:
                torch._foreach_copy_([tensors[i].detach() for i in group], [parts[i] for i in group])


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return a 0-dim bool on the device of the first tensor; counters that some optimizers keep on the host are
    ignored."""
    device = tensors[0].device
    checked = [t for t in tensors if t.is_floating_point() and t.numel() and (t.device == device or t.dim())]
    return torch.stack([finite_flag(t).to(device, non_blocking=True) for t in checked]).all()


class HostCopies:
    """Copies tensors to host memory behind the work that is queued on their device; nothing waits for the copies."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies: list[Tensor] | None = None
        self._ready: torch.cuda.Event | None = None

    def start(self) -> None:
        """Begin to copy the present tensors."""
        if self._copies is None:
            self._copies = [
                torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda) for t in self._tensors
            ]
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        if any(t.is_cuda for t in self._tensors):
            self._ready = torch.cuda.Event()
            self._ready.record()

    def arrived(self) -> list[Tensor]:
        """Return the copies; one step after ``start`` they have arrived."""
        assert self._copies is not None, "nothing was started"
        if self._ready is not None:
            self._ready.synchronize()
        return self._copies
