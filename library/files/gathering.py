"""Gather sharded tensors, one at a time, for the process that writes files.

The first process writes each file alone, in the file's own order. The others wait: whenever it asks for a tensor with
``whole``, they send it their shards. So whatever writes files needs to know nothing of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError

#: sent instead of a tensor's place when nothing more is needed
_END = -1


@dataclass(frozen=True)
class Shard:
    """This process's rows of a tensor that is sharded by its first dimension, as FSDP does it."""

    local: Tensor
    shape: tuple[int, ...]  # of the whole tensor

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Return this process's rows of a whole tensor, a view."""
        rows = -(-self.shape[0] // torch.distributed.get_world_size())
        return tensor[rows * torch.distributed.get_rank() :][: self.local.shape[0]]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is FSDP's kind of tensor, of which each process has a part."""
    return hasattr(tensor, "to_local")


def shard_of(tensor: Tensor) -> Shard:
    """Return this process's part of a sharded tensor, in the same memory."""
    with torch.no_grad():
        return Shard(tensor.detach().to_local(), tuple(tensor.shape))


def shards_of(modules: Iterable[nn.Module]) -> list[Shard]:
    """Return this process's parts of the sharded parameters of modules, in the same order on all processes."""
    return [shard_of(p) for module in modules for p in module.state_dict().values() if is_sharded(p)]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor: itself, or what ``write_together`` gathers of its shards.

    Args:
        tensor: FSDP's, or the local part of one that ``write_together`` was given.
    """
    if not _OPEN:
        if is_sharded(tensor):
            raise RuntimeError("a sharded tensor is read by one process alone")
        return tensor
    return _OPEN[-1].whole(shard_of(tensor).local if is_sharded(tensor) else tensor)


def write_together(work: Callable[[], None], shards: Sequence[Shard], device: torch.device) -> None:
    """Call ``work`` on the first process; the others send it their shards of each tensor that it asks for.

    Every process must call it.

    Args:
        shards: what it may ask for, in the same order on all processes.
        device: on which processes can exchange tensors.

    Raises:
        UserError: the first process's, on all.
    """
    source = _Source(shards, device)
    problem = [""]
    if torch.distributed.get_rank() != 0:
        source.serve()
        torch.distributed.broadcast_object_list(problem, 0, device=device)
        if problem[0]:
            raise UserError(problem[0])
        return
    _OPEN.append(source)
    try:
        work()
    except UserError as error:
        problem = [str(error)]
        raise
    finally:
        _OPEN.pop()
        source.ask(_END)
        torch.distributed.broadcast_object_list(problem, 0, device=device)


class _Source:
    """The shards of one call of ``write_together``."""

    def __init__(self, shards: Sequence[Shard], device: torch.device) -> None:
        self._shards = shards
        self._device = device
        # the first process has rows of every tensor, so that the memory identifies it
        self._places = {shard.local.data_ptr(): place for place, shard in enumerate(shards)}

    def ask(self, place: int) -> int:
        """Send the place from the first process to the others, and return it on them."""
        sent = torch.tensor(place, device=self._device)
        torch.distributed.broadcast(sent, 0)
        return int(sent)

    def serve(self) -> None:
        """Send shards until the first process needs no more."""
        while (place := self.ask(_END)) != _END:
            self._gather(self._shards[place], self._shards[place].local.dtype)

    def whole(self, local: Tensor) -> Tensor:
        place = self._places.get(local.data_ptr())
        if place is None or local.numel() == 0:
            return local
        self.ask(place)
        return self._gather(self._shards[place], local.dtype)

    def _gather(self, shard: Shard, dtype: torch.dtype) -> Tensor:
        """Return the whole tensor on the first process; bytes are sent, because that works for every dtype."""
        processes, row = torch.distributed.get_world_size(), math.prod(shard.shape[1:]) * dtype.itemsize
        size = -(-shard.shape[0] // processes) * row  # of the largest part, in bytes
        part = torch.zeros(size, dtype=torch.uint8, device=self._device)
        here = shard.local.detach().contiguous().view(-1).view(torch.uint8)
        part[: here.numel()] = here
        if torch.distributed.get_rank() != 0:
            torch.distributed.gather(part, dst=0)
            return part
        row_of_parts = torch.empty(size * processes, dtype=torch.uint8, device=self._device)
        torch.distributed.gather(part, list(row_of_parts.split(size)), dst=0)
        return row_of_parts[: shard.shape[0] * row].view(dtype).view(shard.shape)


#: the sources that are open on the first process
_OPEN: list[_Source] = []
