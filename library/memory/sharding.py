"""Shard a model over processes: each keeps its part of every weight and gathers the rest block by block.

It uses torch's FSDP2 (``torch.distributed.fsdp.fully_shard``): before a block runs, forward or backward, its weights
are gathered from all processes, and freed afterwards. Adapters replace the ``forward`` of single layers within
the blocks, so they find whole weights whenever they run. Their own parameters are not part of the model and stay whole.
Where the model itself is trained, the gradients of a block are averaged over the processes when its backward pass is
done, and each process keeps those of its parts (``library.optim.shards``).

All processes must run the same blocks in the same order, because each gather is a collective call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from library.errors import UserError, did_you_mean
from library.files.gathering import is_sharded


@dataclass(frozen=True)
class Sharding:
    """The settings of sharding weights; messages use the names of accelerate's configuration of FSDP."""

    free_after_forward: bool = True  # free a block's weights between its forward and its backward pass
    on_host: bool = False  # keep the shards in host memory
    classes: tuple[str, ...] = ()  # class names of the blocks; the family's own ones, if none
    kept_whole: str | None = None  # regular expression of module paths that are not sharded
    asked_as: str = "FSDP"  # what the user asked for


@dataclass(frozen=True)
class ShardSizes:
    """Numbers of parameters."""

    here: int  # that this process keeps between steps
    total: int


def shard_model(
    model: nn.Module,
    blocks: Sequence[str],
    sharding: Sharding,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Shard a model over all processes, in place, moving it block by block to ``device``.

    At most one block is whole on the device. Weights must be the same on all processes.

    Args:
        model: on the host; its modules' classes become subclasses of theirs.
        blocks: class names of the family's blocks.
        sharding: whose ``classes`` win.
        dtype: of the shards, if it is not the model's; no block is converted before its turn.

    Raises:
        UserError: classes or modules that the model does not have.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    units = find_units(model, sharding.classes or blocks, blocks)
    kept = _kept_whole(model, sharding.kept_whole, device)
    # without a mixed precision policy: weights have the run's dtype already, and autocast does the rest
    settings = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy() if sharding.on_host else OffloadPolicy(),
        "ignored_params": kept,
    }
    for unit in reversed(units):  # inner ones first
        _prepare(unit, dtype)
        fully_shard(unit, reshard_after_forward=sharding.free_after_forward, **settings)
    # modules in no block are needed at the start and the end: torch keeps them from the forward to the backward pass
    _prepare(model, dtype)
    fully_shard(model, **settings)
    for unit in (*units, model):
        # torch allocates its gather buffers once; buffers from a preview in inference mode would be unusable in a step
        unit.unshard()
        unit.reshard()


def _prepare(unit: nn.Module, dtype: torch.dtype | None) -> None:
    """Give the weights that are not sharded yet the form that FSDP takes: contiguous, in the dtype of the shards."""
    for parameter in unit.parameters():
        if not is_sharded(parameter):
            parameter.data = parameter.data.to(dtype or parameter.dtype).contiguous()


def find_units(model: nn.Module, classes: Sequence[str], blocks: Sequence[str]) -> list[nn.Module]:
    """Return the modules of these classes, outer modules before inner ones.

    Args:
        blocks: class names to advise.

    Raises:
        UserError: a class that the model does not have, or that is never called as a module.
    """
    callable_ = {type(m).__name__ for m in model.modules() if type(m).forward is not nn.Module.forward}
    for name in classes:
        if name not in callable_:
            hint = did_you_mean(name, callable_)
            raise UserError(
                f"fsdp_transformer_layer_cls_to_wrap {name}: the model has no such blocks{hint}; leave it empty, which "
                f"means {', '.join(blocks) or 'the whole model'}"
            )
    return [m for m in model.modules() if type(m).__name__ in set(classes) and m is not model]


def _kept_whole(model: nn.Module, pattern: str | None, device: torch.device) -> set[nn.Parameter]:
    if pattern is None:
        return set()
    try:
        found = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"fsdp_ignored_modules {pattern}: no regular expression ({error})") from None
    if not found:
        raise UserError(f"fsdp_ignored_modules {pattern}: fits no module of the model; correct or remove it")
    kept = {parameter for module in found for parameter in module.to(device).parameters()}
    for parameter in kept:
        if parameter.requires_grad and device.type == "cpu":
            parameter.data = parameter.data.clone()  # it may be a view of the model's mapped file
    return kept


def shard_sizes(model: nn.Module) -> ShardSizes:
    """Return the sizes of what this process keeps of a model; call it between steps."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return ShardSizes(here, sum(p.numel() for p in parameters))
