"""The frozen model of a run, placed as the run has it: whole on the device, or shared out over the processes.

What is shared out is the denoiser. Text encoders stay whole: a cache of their outputs leaves none of them, and without
one, processes may encode different numbers of captions, where gatherings must meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from library.config.no_effect import report
from library.errors import NoEffect, UserError
from library.memory.host_convolution import convolve_as_products
from library.memory.sharding import Sharding, shard_model, shard_sizes
from library.training.launch import asked_sharding
from library.training.precision import Fp8Parts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.architectures.base import Architecture
    from library.training.run import Run


def sharding_for(accelerator: Accelerator, *, strict: bool) -> Sharding | None:
    """What can be had on this machine of the sharing out that accelerate's configuration asks for.

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


def load_denoiser(run: Run, architecture: Architecture) -> nn.Module:
    """Load the denoiser to where it is worked on until it has its final form."""
    waits = run.sharding is not None or Fp8Parts.of(run.options).denoiser
    home = "cpu" if waits else str(run.device)
    denoiser = architecture.load_denoiser(run.checked.checkpoint, dtype=run.weight_dtype, device=home)
    if run.sharding is not None:
        # FSDP takes contiguous weights only. And where it hands on a batch of one with channels last, strides change:
        # layers would work in another layout than when a checkpointed block runs again, and dropout draw otherwise
        return denoiser
    # convolutions are faster so; benchmarks/RESULTS.md has the metrics. Linear layers stay as they are
    denoiser = denoiser.to(memory_format=torch.channels_last)
    if run.device.type == "cpu":
        convolve_as_products(denoiser)
    return denoiser


def shard_denoiser(run: Run, architecture: Architecture) -> None:
    """Share the denoiser out, if accelerate's configuration asks for it.

    It comes after all that reads or changes whole weights: merging, and the making of adapters.

    Raises:
        UserError: see ``library.memory.sharding.shard_model``.
    """
    if run.sharding is not None:
        shard_model(run.denoiser, architecture.compiled_blocks, run.sharding, run.device)


def sharding_rows(run: Run) -> list[tuple[str, str]]:
    """For the table before the first step."""
    if run.sharding is None:
        return []
    shares = shard_sizes(run.denoiser)
    if shares.here == shares.total:  # a dry run has no weights
        return [("shared out", f"FSDP, over {run.accelerator.num_processes} processes")]
    where = "host memory" if run.sharding.on_host else "device memory"
    return [("shared out", f"FSDP, {shares.here:,} of {shares.total:,} frozen parameters in each process's {where}")]
