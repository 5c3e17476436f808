"""Place the frozen denoiser of a run: whole on the device, or sharded over the processes.

Only the denoiser is sharded. Text encoders stay whole: with cached outputs none is loaded, and otherwise processes may
encode different numbers of captions, which collective calls do not allow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.config.no_effect import report
from library.errors import NoEffect, UserError
from library.memory.sharding import Sharding, shard_sizes
from library.training.launch import asked_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator


def sharding_for(accelerator: Accelerator, *, strict: bool) -> Sharding | None:
    """Return the sharding that accelerate's configuration asks for, checked for this machine.

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
    home: str,
    sharded: bool,
) -> nn.Module:
    """Load the denoiser to the device where it is prepared.

    Args:
        home: where that is; it may run elsewhere later.
    """
    denoiser = architecture.load_denoiser(checkpoint, dtype=dtype, device=home)
    if sharded:
        # FSDP needs contiguous weights. With channels last, it changes the strides of a batch of one: a recomputed
        # checkpointed block would have another layout, and dropout would draw other numbers
        return denoiser
    # convolutions are faster in this format, see benchmarks/RESULTS.md; linear layers are unchanged
    return denoiser.to(memory_format=torch.channels_last)


def sharding_rows(sharding: Sharding | None, denoiser: nn.Module, processes: int) -> list[tuple[str, str]]:
    """Return rows for the table before the first step."""
    if sharding is None:
        return []
    sizes = shard_sizes(denoiser)
    if sizes.here == sizes.total:  # a dry run has no weights
        return [("sharding", f"FSDP, over {processes} processes")]
    where = "host memory" if sharding.on_host else "device memory"
    return [("sharding", f"FSDP, {sizes.here:,} of {sizes.total:,} frozen parameters in each process's {where}")]
