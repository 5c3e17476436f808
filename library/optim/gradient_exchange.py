"""Average gradients over processes, once per step.

The trained modules work through the frozen model's forward, which DistributedDataParallel does not see; so gradients
are averaged here, in buckets of one dtype, which bounds the memory for what is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.optim.layout import view_laid_out_as

if TYPE_CHECKING:
    from accelerate import Accelerator


#: elements that are exchanged at once
MOST_AT_ONCE = 2**25


class GradientExchange:
    """The exchange of one run; without effect in a single process.

    Parameters that need no gradient in a step, the same on all processes, get none: a zero gradient would let momenta
    move them.

    Args:
        parameters: whose gradients are averaged, in the same order on all processes.
        as_views: gradients are views of the exchanged tensors, the same in each step
            (``--ddp_gradient_as_bucket_view``), so that they are neither copied nor held twice. The averages are the
            same.
    """

    def __init__(self, accelerator: Accelerator, parameters: Sequence[nn.Parameter], *, as_views: bool = False) -> None:
        self._accelerator = accelerator
        self._alone = accelerator.num_processes == 1
        self._parameters = [p for p in parameters if p.requires_grad]
        self._as_views = as_views and not self._alone
        self._flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def start(self) -> None:
        """Prepare for the first backward pass of a step."""
        if not self._as_views:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self._parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for key, group in groups.items():
            sizes = [p.numel() for p in group]
            if key not in self._flat:
                self._flat[key] = torch.empty(sum(sizes), dtype=key[0], device=key[1])
            for parameter, part in zip(group, self._flat[key].zero_().split(sizes), strict=True):
                parameter.grad = view_laid_out_as(parameter, part)

    def average(self) -> None:
        """Set every gradient to its mean over all processes; every process must call it."""
        if self._alone:
            return
        if self._as_views:
            for flat in self._flat.values():
                torch.distributed.all_reduce(flat)
                flat /= self._accelerator.num_processes
            for parameter in self._parameters:
                if not parameter.requires_grad:
                    parameter.grad = None
            return
        gradients = []
        for parameter in self._parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                # module dropout may leave a parameter out on one process only; all must take part
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in buckets_of(gradients):
            flat = self._accelerator.reduce(torch.cat([g.reshape(-1) for g in bucket]), reduction="mean")
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def buckets_of(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Yield buckets of tensors in their order, by dtype, of at most ``MOST_AT_ONCE`` elements or a single tensor."""
    buckets: list[list[Tensor]] = []
    open_buckets: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        bucket, size = open_buckets.get(tensor.dtype, ([], 0))
        if not bucket or size + tensor.numel() > MOST_AT_ONCE:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        open_buckets[tensor.dtype] = (bucket, size + tensor.numel())
    return buckets
