"""The frozen denoiser of a run: whole on the device, or sharded over the processes.

Only the denoiser is sharded. Text encoders stay whole: a cache of their outputs leaves none of them, and without
one, processes may encode different numbers of captions, where gatherings must meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.config.no_effect import report
from library.errors import NoEffect, UserError
from library.memory.host_convolution import convolve_as_products
from library.memory.sharding import Sharding, shard_sizes
from library.training.launch import asked_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator


def sharding_for(accelerator: Accelerator, *, strict: bool) -> Sharding | None:
    """The sharding that accelerate's configuration asks for, as far as this machine can do it.

    Raises:
        UserError: a setting that needs a GPU; one process, under ``--strict``.
    """
    sharding = asked_sharding()
    if sharding is None:
        return None
    if accelerator.num_processes == 1:
        report(
            [NoEffect("accelerate's configuration asks for FSDP, which has no effect with one process")], strict=strict
        )
        return None
    if sharding.on_host and accelerator.device.type == "cpu":
        raise UserError("fsdp_offload_params: on a CPU weights are in host memory anyway; set it to false")
    return sharding


def load_denoiser(
    architecture: Architecture,
    checkpoint: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    waits: bool,
    sharding: Sharding | None,
) -> nn.Module:
    """Load the denoiser to where it is worked on until it has its final form.

    Args:
        waits: whether it is stored otherwise before it is moved to ``device``.
    """
    home = "cpu" if waits or sharding is not None else str(device)
    denoiser = architecture.load_denoiser(checkpoint, dtype=dtype, device=home)
    if sharding is not None:
        # FSDP takes contiguous weights only. And where it hands on a batch of one with channels last, strides change:
        # layers would work in another layout than when a checkpointed block runs again, and dropout draw otherwise
        return denoiser
    # convolutions are faster so; benchmarks/RESULTS.md has the metrics. Linear layers stay as they are
    denoiser = denoiser.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        convolve_as_products(denoiser)
    return denoiser


def sharding_rows(sharding: Sharding | None, denoiser: nn.Module, processes: int) -> list[tuple[str, str]]:
    """Rows for the table before the first step."""
    if sharding is None:
        return []
    sizes = shard_sizes(denoiser)
    if sizes.here == sizes.total:  # a dry run has no weights
        return [("sharding", f"FSDP, over {processes} processes")]
    where = "host memory" if sharding.on_host else "device memory"
    return [("sharding", f"FSDP, {sizes.here:,} of {sizes.total:,} frozen parameters in each process's {where}")]
