"""Send a batch from a worker to the main process.

torch sends every tensor as its own shared memory file: opened, passed through a socket and mapped, which for small
tensors takes far longer than copying. Here small tensors go through the worker's pipe with everything else, and only
large ones are shared (measured in ``benchmarks/RESULTS.md``).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: bytes above which sharing a tensor is cheaper than copying it twice through a pipe
LARGE = 1 << 20


class Parcel(Generic[T]):
    """A picklable object, packed; tensors in it are on the host and need no gradient."""

    def __init__(self, content: T) -> None:
        self._large: list[Tensor] = []
        packed = io.BytesIO()
        _Packer(packed, self._large).dump(content)
        self._packed = packed.getvalue()

    def unpack(self) -> T:
        return _Unpacker(io.BytesIO(self._packed), self._large).load()

    def pin_memory(self) -> T:
        """Called by the loader's thread; the content has such a method too."""
        return self.unpack().pin_memory()  # type: ignore[attr-defined]


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, large: list[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._large = large

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or obj.nbytes < LARGE:
            return None
        self._large.append(obj)
        return len(self._large) - 1

    def reducer_override(self, obj: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]] | Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        # as bytes, since not every dtype of torch is one of numpy
        return _tensor, (obj.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), obj.dtype, tuple(obj.shape))


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, large: list[Tensor]) -> None:
        super().__init__(file)
        self._large = large

    def persistent_load(self, pid: int) -> Tensor:
        return self._large[pid]


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    # torch needs writable memory
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
