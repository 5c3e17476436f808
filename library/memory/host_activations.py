"""Keep the activations of checkpointed blocks in host memory (``--cpu_offload_checkpointing``).

With gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) only the input of each block is kept until the backward
pass. These inputs are moved to pinned host memory and come back when their block is recomputed. Copies run on the
device's own stream, in order with its work, so nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: smaller tensors are not worth a transfer
_LEAST_BYTES = 64 * 1024


class HostActivations(torch.autograd.graph.saved_tensors_hooks):
    """A context for a forward pass: activations saved within are kept on the host. Gradients are bit for bit the same.

    Args:
        least_bytes: of tensors that are moved.
        from_host: also copy tensors that are already on the host, for tests on machines without a GPU.
    """

    def __init__(self, *, least_bytes: int = _LEAST_BYTES, from_host: bool = False) -> None:
        self.moved_bytes = 0
        self._least = least_bytes
        self._from_host = from_host
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        # weights and views of them are on the device anyway
        root = tensor if tensor._base is None else tensor._base
        if isinstance(root, nn.Parameter) or tensor.nbytes < self._least:
            return None, tensor
        if tensor.device.type == "cpu" and not self._from_host:
            return None, tensor
        on_host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        on_host.copy_(tensor, non_blocking=True)
        self.moved_bytes += tensor.nbytes
        return tensor.device, on_host

    def _unpack(self, packed: tuple[Any, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)
