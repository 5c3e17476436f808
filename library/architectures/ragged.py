"""Texts of different lengths: padding is cut off single captions, and added where captions form a batch.

Families whose text encoders take any length name such tensors in ``TextFormat.ragged``, each with the mask that tells
which of its tokens are a caption's. Padding always comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def trimmed(tensors: Mapping[str, Tensor], masks: Mapping[str, str], *, axis: int = 0) -> dict[str, Tensor]:
    """Return the tensors of one caption, on the host, without padding.

    Args:
        masks: tensor -> its mask, which may be the tensor itself; other tensors are returned as they are.
        axis: of the tokens; 1 where there is a batch axis, of length 1.
    """
    lengths = {mask: int(tensors[mask].count_nonzero()) for mask in set(masks.values()) if mask in tensors}
    return {
        name: tensor.narrow(axis, 0, lengths[masks[name]]) if masks.get(name) in lengths else tensor
        for name, tensor in tensors.items()
    }


def padded(tensor: Tensor, length: int, *, axis: int = 0) -> Tensor:
    """Return the tensor with zeros at the end of an axis, up to a length."""
    missing = length - tensor.shape[axis]
    if missing <= 0:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, missing))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Join (B, ...) tensors along the batch; token axes (the second ones) are padded to the longest."""
    if tensors[0].dim() > 1 and len({tensor.shape[1] for tensor in tensors}) > 1:
        length = max(tensor.shape[1] for tensor in tensors)
        tensors = [padded(tensor, length, axis=1) for tensor in tensors]
    return torch.cat(list(tensors))


class PackedRows:
    """Rows of different lengths, one after the other in one tensor, which processes share as one."""

    def __init__(self, count: int) -> None:
        self._loose: dict[int, Tensor] = {}
        self._starts, self._stops = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        self._packed: Tensor | None = None

    def put(self, place: int, row: Tensor) -> None:
        self._loose[place] = row

    def pack(self) -> None:
        """Join what was put; call it once, after the last row."""
        start = 0
        for place, row in self._loose.items():
            self._starts[place], self._stops[place] = start, start + len(row)
            start += len(row)
        self._packed = torch.cat(list(self._loose.values()))
        self._loose = {}

    def get(self, place: int) -> Tensor:
        assert self._packed is not None, "rows are read after they are packed"
        return self._packed[int(self._starts[place]) : int(self._stops[place])]
