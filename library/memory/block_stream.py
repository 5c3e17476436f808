"""Keep blocks of a model in host memory, and copy each to the device when it runs (``--blocks_to_swap``).

The blocks that wait on the host are spread evenly between those that stay, so that the copy of one runs while others
compute. Host copies are pinned; those of frozen blocks never change, so nothing is copied back. On the device each
shape of block has two buffers: one for the block that runs, one for the next block, which a second stream copies at the
same time. In the backward pass, with gradient checkpointing, blocks run again in reverse order. The two blocks at the
turn are still in their buffers there, and at the end of the backward pass the first blocks are there for the next
forward pass.

A block is known to run by a hook before its forward pass. Adapters within a block use its layers, so they find the
weights there as well; their own weights stay on the device. Without checkpointing autograd would keep the buffers'
contents, which the next block overwrites, so loading turns checkpointing on; where it is not, torch finds that saved
tensors have changed, and raises an error in the backward pass.

Trained blocks are updated within the backward pass, while they are in their buffers (``library.optim.fused_backward``).
What has changed is copied back when the buffer is needed for another block. ``settle`` waits for these copies, before
the host reads weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.memory.transfers import Transfers

#: blocks of each list that stay on the device at least
_STAY = 2
#: buffers for blocks of one shape: the block that runs, and the next
_BUFFERS = 2

Signature = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


def swapped_counts(lengths: Sequence[int], count: int) -> list[int]:
    """Return the number of blocks of each list that wait on the host.

    As published: half of ``count`` in a first list of heavy blocks, and two light blocks of a second list for each
    of the other half.

    Args:
        lengths: of the lists: one, or heavy blocks before light ones.

    Raises:
        UserError: more than the lists have, naming the largest possible number.
    """

    largest = largest_count(lengths, count)
    if largest < count:
        what = " and ".join(map(str, lengths))
        raise UserError(f"--blocks_to_swap {count}: the model has {what} blocks, of which {largest} can be swapped")
    return _split(lengths, count)


def largest_count(lengths: Sequence[int], count: int) -> int:
    """Return the largest number up to ``count`` that ``swapped_counts`` takes."""

    def fits(number: int) -> bool:
        return all(part <= length - _STAY for part, length in zip(_split(lengths, number), lengths, strict=True))

    return next((number for number in range(count, -1, -1) if fits(number)), 0)


def _split(lengths: Sequence[int], count: int) -> list[int]:
    return [count] if len(lengths) == 1 else [count // 2, 2 * (count - count // 2)]


def spread(length: int, count: int) -> list[int]:
    """Return ``count`` of ``length`` places, spread as evenly as possible."""
    return [(2 * number + 1) * length // (2 * count) for number in range(count)]


@dataclass
class _Buffer:
    """Device memory for one block: its tensors, allocated as one piece for each dtype."""

    pieces: dict[torch.dtype, Tensor]
    views: list[Tensor]
    block: int | None = None  # which is in it, or on its way
    arrived: Any = None  # event after its copy


@dataclass
class _Block:
    """A block that waits on the host."""

    tensors: list[Tensor]  # parameters and buffers of the module, whose ``data`` is set
    host: dict[torch.dtype, Tensor]  # their numbers, pinned where the device wants that
    views: list[Tensor]  # of ``host``
    signature: Signature
    trained: bool = False
    ran_backward: bool = False  # since it was copied to the device
    version: int = 0  # of its tensors when it was copied to the device
    buffer: _Buffer | None = field(default=None)


class BlockStream:
    """Streams blocks of a model to a device.

    Args:
        lists: lists of blocks, in the order in which they run; host blocks may be anywhere in them.
        counts: how many of each list wait on the host.
        device: where blocks run.
        copies: the queue of copies, if not that of the device.
    """

    def __init__(
        self,
        lists: Sequence[Sequence[nn.Module]],
        counts: Sequence[int],
        device: torch.device,
        *,
        copies: Transfers | None = None,
    ) -> None:
        self.device = device
        self._copies = copies or Transfers(device)
        self._blocks: list[_Block] = []
        self._buffers: dict[Signature, list[_Buffer]] = {}
        self._running: int | None = None
        self.copied = 0  # blocks copied to the device so far
        self.returned = 0  # blocks copied back to the host so far
        for blocks, count in zip(lists, counts, strict=True):
            waiting = set(spread(len(blocks), count)) if count else set()
            for place, module in enumerate(blocks):
                if place in waiting:
                    self._add(module)
                else:
                    _move(module.modules(), device)
        for signature, buffers in self._buffers.items():
            first = next(block for block in self._blocks if block.signature == signature)
            buffers += [self._make_buffer(first) for _ in range(_BUFFERS)]

    @property
    def host_bytes(self) -> int:
        """Return the bytes of the weights in host memory."""
        return sum(piece.nbytes for block in self._blocks for piece in block.host.values())

    @property
    def buffers(self) -> list[Tensor]:
        """Return the memory of the buffers on the device."""
        return [piece for buffers in self._buffers.values() for b in buffers for piece in b.pieces.values()]

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of the buffers on the device."""
        return sum(piece.nbytes for piece in self.buffers)

    # ---- setting up ----

    def _add(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        trained = any(tensor.requires_grad for tensor in tensors)
        signature = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        host = {dtype: self._copies.host_memory(size, dtype) for dtype, size in _sizes(tensors).items()}
        views = _views(host, tensors)
        for tensor, view in zip(tensors, views, strict=True):
            view.copy_(tensor.detach())
            tensor.data = view
        number = len(self._blocks)
        self._blocks.append(_Block(tensors, host, views, signature, trained))
        self._buffers.setdefault(signature, [])
        module.register_forward_pre_hook(lambda *_: self._need(number))

    def _make_buffer(self, block: _Block) -> _Buffer:
        pieces = {dtype: torch.empty_like(piece, device=self.device) for dtype, piece in block.host.items()}
        return _Buffer(pieces, _views(pieces, block.tensors))

    # ---- running ----

    def _need(self, number: int) -> None:
        """Called before a block runs."""
        block = self._blocks[number]
        if block.buffer is None:
            self._fetch(number)
        assert block.buffer is not None
        self._copies.wait(block.buffer.arrived)
        self._running = number
        block.ran_backward |= _in_backward()
        following = self._following(number)
        if following is not None and self._blocks[following].buffer is None:
            self._fetch(following)

    def _following(self, number: int) -> int | None:
        """Return the next block, if it should be copied now."""
        if _in_backward():  # where blocks run again in reverse
            return number - 1 if number else None
        if number + 1 < len(self._blocks):
            return number + 1
        # at the turn to the backward pass both buffers hold what it begins with
        return None if torch.is_grad_enabled() else 0

    def _fetch(self, number: int) -> None:
        """Begin to copy a block into a buffer of its shape that is not used by the running block."""
        block = self._blocks[number]
        buffers = self._buffers[block.signature]
        buffer = next((b for b in buffers if b.block is None), None)
        if buffer is None:
            free = [b for b in buffers if b.block != self._running]
            # the one farthest from what runs next
            buffer = max(free, key=lambda b: abs((b.block or 0) - number))
            self._put_back(self._blocks[buffer.block or 0], buffer)
        buffer.block, block.buffer = number, buffer
        buffer.arrived = self._copies.start([(buffer.pieces[dtype], piece) for dtype, piece in block.host.items()])
        self.copied += 1
        _bind(block.tensors, buffer.views)
        block.version, block.ran_backward = _version(block.tensors), False

    @torch.no_grad()
    def _put_back(self, block: _Block, buffer: _Buffer) -> None:
        """Release the buffer of a block; first copy to the host what may have changed."""
        if block.trained and (block.ran_backward or _version(block.tensors) != block.version):
            for tensor, view in zip(block.tensors, buffer.views, strict=True):
                if not torch._C._is_alias_of(tensor, view):  # an optimizer has made a new one
                    view.copy_(tensor)
            self._copies.start([(piece, buffer.pieces[dtype]) for dtype, piece in block.host.items()])
            self.returned += 1
        _bind(block.tensors, block.views)
        block.buffer = None

    def settle(self) -> None:
        """Wait until all copies have arrived, so that the host can read and change the weights."""
        self._copies.settle()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _version(tensors: Sequence[Tensor]) -> int:
    """Return a number that changes when a tensor is changed in place."""
    return sum(tensor._version for tensor in tensors)


def _bind(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """Point the tensors of a block to other memory with the same values."""
    for tensor, view in zip(tensors, views, strict=True):
        tensor.data = view
        # a graph that has saved the tensor would read memory that is another block's by then
        torch.autograd.graph.increment_version(tensor)


def _sizes(tensors: Sequence[Tensor]) -> dict[torch.dtype, int]:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + _padded(tensor)
    return sizes


def _padded(tensor: Tensor) -> int:
    """Return a tensor's number of elements, padded so that the next one begins at a multiple of 256 bytes, as kernels
    need."""
    step = 256 // tensor.element_size()
    return -(-tensor.numel() // step) * step


def _views(pieces: dict[torch.dtype, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor's part of the piece of its dtype, in its shape."""
    views, ends = [], dict.fromkeys(pieces, 0)
    for tensor in tensors:
        begin = ends[tensor.dtype]
        views.append(pieces[tensor.dtype][begin : begin + tensor.numel()].view(tensor.shape))
        ends[tensor.dtype] = begin + _padded(tensor)
    return views


def stream_blocks(
    model: nn.Module,
    lists: Sequence[Sequence[nn.Module]],
    count: int,
    device: torch.device,
    *,
    copies: Transfers | None = None,
) -> BlockStream:
    """Keep ``count`` blocks of a model on the host, and move the rest of it to ``device``.

    Args:
        copies: the queue of copies, if not that of the device.

    Raises:
        UserError: too many.
    """
    counts = swapped_counts([len(blocks) for blocks in lists], count)
    stream = BlockStream(lists, counts, device, copies=copies)
    inside = {id(t) for blocks in lists for b in blocks for t in (*b.parameters(), *b.buffers())}
    _move(model.modules(), device, but=inside)
    return stream


@torch.no_grad()
def _move(modules: Iterable[nn.Module], device: torch.device, *, but: Container[int] = ()) -> None:
    """Move the own tensors of modules, save those with the ids of ``but``."""
    for module in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in but and tensor.device != device:
                tensor.data = tensor.data.to(device)
