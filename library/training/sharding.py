"""Place the denoiser of a run, frozen or trained: whole on the device, or sharded over the processes.

Only the denoiser is sharded. Text encoders stay whole, trained ones too: with cached outputs none is loaded, and
otherwise processes may encode different numbers of captions, which collective calls do not allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.architectures.part import DENOISER
from library.config.arguments import TrainingOptions
from library.config.no_effect import report
from library.errors import NoEffect, UserError
from library.memory.sharding import Sharding, shard_model, shard_sizes
from library.optim.optimizers import OptimizerChoice
from library.optim.zero import check_optimizer
from library.training.kinds.base import Kind, ParameterGroup
from library.training.launch import asked_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator


def sharding_for(options: TrainingOptions, accelerator: Accelerator, *, strict: bool) -> Sharding | None:
    """Return the sharding of weights that is asked for, checked for this machine.

    Raises:
        UserError: a setting that needs a GPU; one process, under ``--strict``.
    """
    sharding = asked_sharding(options)
    if sharding is None:
        return None
    if accelerator.num_processes == 1:
        stays = (
            "; weights stay on the device, and --blocks_to_swap keeps blocks in host memory" if sharding.on_host else ""
        )
        why = f"{sharding.asked_as} has no effect with one process: there is nothing to shard{stays}"
        report([NoEffect(why)], strict=strict)
        return None
    if not (sharding.on_host and accelerator.device.type == "cpu"):
        return sharding
    if sharding.asked_as == "FSDP":
        raise UserError("fsdp_offload_params: on a CPU weights are in host memory anyway; set it to false")
    report(
        [NoEffect("DeepSpeed: offloading has no effect on a CPU, where all is in host memory anyway")], strict=strict
    )
    return replace(sharding, on_host=False)


def load_denoiser(
    architecture: Architecture,
    checkpoint: Any,
    *,
    dtype: torch.dtype,
    home: str,
    sharded: bool,
    trained: bool,
) -> nn.Module:
    """Load the denoiser to the device where it is prepared.

    Args:
        home: where that is; it may run elsewhere later.
        trained: a sharded denoiser then keeps its file's dtype, so that no process has a converted copy of it;
            ``shard_denoiser`` converts the shards.
    """
    own = _own_dtype(architecture, checkpoint) if sharded and trained and dtype != torch.float16 else None
    denoiser = architecture.load_denoiser(checkpoint, dtype=own or dtype, device=home)
    if own is not None:
        for module in denoiser.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
    if sharded:
        # FSDP needs contiguous weights. With channels last, it changes the strides of a batch of one: a recomputed
        # checkpointed block would have another layout, and dropout would draw other numbers
        return denoiser
    # convolutions are faster in this format, see benchmarks/RESULTS.md; linear layers are unchanged
    return denoiser.to(memory_format=torch.channels_last)


def _own_dtype(architecture: Architecture, checkpoint: Any) -> torch.dtype | None:
    """Return the dtype of the denoiser in its file, if all of it has one that every other dtype can follow."""
    source = architecture.parts(checkpoint)[DENOISER].source
    dtypes = {source.file.dtypes.get(name) for name in source.file_names()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16, torch.float16} else None


def check_trained(kind: Kind, optimizer: OptimizerChoice, sharding: Sharding) -> None:
    """Refuse to train a sharded denoiser with an optimizer that does not work on parts of weights.

    Raises:
        UserError: such an optimizer.
    """
    if DENOISER in kind.needs():
        check_optimizer(
            optimizer.create([{"params": [nn.Parameter(torch.zeros(2, 2))]}]),
            given=f"{sharding.asked_as} gives it parts of each weight",
            instead=f"train without {sharding.asked_as}",
        )


def shard_denoiser(
    denoiser: nn.Module,
    blocks: Sequence[str],
    sharding: Sharding,
    device: torch.device,
    groups: Sequence[ParameterGroup],
    dtype: torch.dtype | None,
) -> None:
    """Shard the denoiser, see ``shard_model``; trained weights in ``groups`` are replaced by the sharded ones.

    Args:
        dtype: of the weights in training; ``None`` for that of frozen ones.
    """
    names = {parameter: name for name, parameter in denoiser.named_parameters()}
    given = [[names.get(p, p) for p in group.parameters] for group in groups]
    # the whole weights of a block are freed only if nothing else has them
    names.clear()
    for group in groups:
        group.settings["params"] = []
    shard_model(denoiser, blocks, sharding, device, dtype=dtype)
    sharded = dict(denoiser.named_parameters())
    for group, parameters in zip(groups, given, strict=True):
        group.settings["params"] = [sharded[p] if isinstance(p, str) else p for p in parameters]


def sharding_rows(sharding: Sharding | None, denoiser: nn.Module, processes: int) -> list[tuple[str, str]]:
    """Return rows for the table before the first step."""
    if sharding is None:
        return []
    sizes = shard_sizes(denoiser)
    if sizes.here == sizes.total:  # a dry run has no weights
        return [("sharding", f"{sharding.asked_as}, over {processes} processes")]
    where = "host memory" if sharding.on_host else "device memory"
    how = "trained" if any(p.requires_grad for p in denoiser.parameters()) else "frozen"
    here = f"{sizes.here:,} of {sizes.total:,} {how} parameters in each process's {where}"
    return [("sharding", f"{sharding.asked_as}, {here}")]
