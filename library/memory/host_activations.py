"""Keep the activations of checkpointed blocks in host memory (``--cpu_offload_checkpointing``).

With gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) only the input of each block is kept until the backward
pass. These inputs are moved to pinned host memory, and come back when their block is recomputed. Both ways have a stream
of their own, so that copies run beside the computation: the forward pass goes on while inputs leave, and in the
backward pass those of the next blocks arrive while a block is recomputed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.transfers import Transfers

#: smaller tensors are not worth a transfer
_LEAST_BYTES = 64 * 1024
#: tensors that come back ahead of their use: the inputs of a block are two at most
_AHEAD = 2

#: queues of copies to the host and back
Ways = tuple[Transfers, Transfers]


@cache
def _ways(device: torch.device) -> Ways:
    return Transfers(device), Transfers(device)


class _Moved:
    """A tensor on the host, and its copy on the device once that is asked for."""

    def __init__(self, tensor: Tensor, ways: Ways, number: int) -> None:
        self.number, self._device, (self._out, self._back) = number, tensor.device, ways
        self._host = self._out.host_like(tensor)
        self._left = self._out.start([(self._host, tensor)])
        self._out.hold(tensor)
        self._copy: Tensor | None = None
        self._arrived: Any = None
        #: an input of several blocks, whose copy stays until the last of them has run
        self.is_shared = False

    def fetch(self) -> None:
        """Begin to copy it back, once."""
        if self._copy is None:
            self._copy = torch.empty_like(self._host, device=self._device)
            self._arrived = self._back.start([(self._copy, self._host)], after=[self._left])
            self._back.hold(self._copy)

    def take(self) -> Tensor:
        """Return it on the device."""
        self.fetch()
        copy = self._copy
        assert copy is not None
        self._back.wait(self._arrived)
        if not self.is_shared:
            self._copy = None
        return copy


class HostActivations(torch.autograd.graph.saved_tensors_hooks):
    """A context for a forward pass: activations saved within are kept on the host. Gradients are bit for bit the same.

    Args:
        least_bytes: of tensors that are moved.
        from_host: also copy tensors that are already on the host, for tests on machines without a GPU.
        ways: returns the queues of copies of a device.
    """

    def __init__(
        self,
        *,
        least_bytes: int = _LEAST_BYTES,
        from_host: bool = False,
        ways: Callable[[torch.device], Ways] = _ways,
    ) -> None:
        self.moved_bytes = 0
        self._least = least_bytes
        self._from_host = from_host
        self._find_ways = ways
        #: in the order of the forward pass; whoever needs them holds them
        self._order: list[weakref.ref[_Moved]] = []
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[_Moved]]] = {}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        # weights and views of them are on the device anyway
        root = tensor if tensor._base is None else tensor._base
        if isinstance(root, nn.Parameter) or tensor.nbytes < self._least:
            return tensor
        if tensor.device.type == "cpu" and not self._from_host:
            return tensor
        # inputs of several blocks, such as rotary positions, are moved once; no operation may change a tensor in place
        # after another has saved it
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        source, known = self._known.get(key, (None, None))
        if source is not None and known is not None and source() is storage and (moved := known()) is not None:
            moved.is_shared = True
            return moved
        moved = _Moved(tensor, self._find_ways(tensor.device), len(self._order))
        self._order.append(weakref.ref(moved))
        self._known[key] = weakref.ref(storage), weakref.ref(moved)
        self.moved_bytes += tensor.nbytes
        return moved

    def _unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        taken = packed.take()
        if not packed.is_shared:  # the backward pass needs the others in reverse
            del self._order[packed.number :]
        ahead = (moved for reference in reversed(self._order) if (moved := reference()) and not moved.is_shared)
        for moved in islice(ahead, _AHEAD):
            moved.fetch()
        return taken
