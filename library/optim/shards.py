"""Train parameters of which each process has a part.

FSDP shards a parameter by its rows. The optimizer gets, instead of it, a parameter of its own in the memory of this
process's rows: a plain tensor, for which optimizers, averages, snapshots and rounding work as for any other. FSDP
averages the gradients over the processes in the backward pass. What looks at all numbers at once (the norm of the
gradients, whether something is finite) is completed here. States hold whole tensors, so that a run can be resumed with
another number of processes, or without FSDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from mmap import MAP_SHARED
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.files.atomic import atomic_path
from library.files.gathering import Shard, is_sharded, shard_of, whole, write_together
from library.optim.flat import all_finite


class LocalShards:
    """The parts of a run's parameters that this process updates; without sharded parameters it changes nothing.

    Args:
        parameters: of the model, the same on all processes; some, all or none of them sharded.
        device: on which processes can exchange tensors.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._locals: dict[nn.Parameter, nn.Parameter] = {}
        self._shards: dict[nn.Parameter, Shard] = {}  # by local parameter
        for parameter in parameters:
            if is_sharded(parameter):
                shard = shard_of(parameter)
                local = nn.Parameter(shard.local, requires_grad=parameter.requires_grad)
                self._locals[parameter], self._shards[local] = local, shard

    def __bool__(self) -> bool:
        return bool(self._locals)

    def __contains__(self, local: object) -> bool:
        return local in self._shards

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what the optimizer updates for a parameter of the model; a whole one is returned itself."""
        return self._locals.get(parameter, parameter)

    @property
    def on_host(self) -> bool:
        """Whether shards are in host memory while the model runs elsewhere."""
        return any(local.device != self._device for local in self._shards)

    # ---- a step ----

    def take_gradients(self) -> None:
        """Give the optimizer's parameters the gradients of the model's."""
        for parameter, local in self._locals.items():
            gradient, parameter.grad = parameter.grad, None
            local.grad = None if gradient is None else shard_of(gradient).local

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of the optimizer's parameters, each number counted once."""
        sharded, all_here = torch.zeros((2,), device=self._device).unbind()
        for parameter in parameters:
            if parameter.grad is not None:
                square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
                (sharded if parameter in self else all_here).add_(square.to(self._device, non_blocking=True))
        if self:
            torch.distributed.all_reduce(sharded)
        return (sharded + all_here).sqrt()

    def everywhere(self, flag: Tensor) -> Tensor:
        """Return whether a 0-dim bool holds on all processes."""
        if not self:
            return flag
        number = flag.to(self._device).float()
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN)
        return number > 0

    def share_infinity(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make a gradient infinite on every process if one is on any, so that all leave out the same steps."""
        gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
        bad = ~self.everywhere(all_finite(gradients))
        gradients[0].masked_fill_(bad.to(gradients[0].device), float("inf"))

    # ---- whole tensors ----

    def write_together(self, work: Callable[[], None], tensors: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Call ``work`` on the first process, which may ask ``whole`` for tensors; every process must call it.

        Args:
            tensors: this process's parts, each with the optimizer's parameter that has its shape, in the same order on
                all processes.
        """
        parts = [Shard(tensor, self._shards[p].shape) for p, tensor in tensors if self.has_part(p, tensor)]
        write_together(work, parts, self._device)

    def has_part(self, parameter: nn.Parameter, value: Any) -> bool:
        """Whether a value is a part of a tensor of the model's parameter's shape."""
        return isinstance(value, Tensor) and parameter in self and value.dim() > 0 and value.shape == parameter.shape

    def part_of(self, parameter: nn.Parameter, value: Any) -> Any:
        """Return this process's part of a whole tensor of the model's parameter's shape; other values themselves."""
        if isinstance(value, Tensor) and parameter in self and tuple(value.shape) == self._shards[parameter].shape:
            return self._shards[parameter].rows_of(value).clone()
        return value

    def whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the shape of the model's parameter."""
        return self._shards[parameter].shape if parameter in self else tuple(parameter.shape)


class SharedStates:
    """The states of an optimizer of local shards: it loads whole ones, and ``write`` writes them.

    Its own ``state_dict`` gives no tensors any more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shards: LocalShards) -> None:
        self._optimizer, self._shards = optimizer, shards
        self._load, self._read = optimizer.load_state_dict, optimizer.state_dict
        optimizer.load_state_dict = self._load_parts
        optimizer.state_dict = lambda: {**self._read(), "state": {}}

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _load_parts(self, state: Mapping[str, Any]) -> None:
        parameters, part_of = self._parameters, self._shards.part_of
        parts = {
            number: {name: part_of(parameters[number], value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        self._load({**state, "state": parts})

    def write(self, path: Path) -> None:
        """Write whole states as accelerate would, one tensor at a time; every process must call it.

        Raises:
            UserError: the disk is full.
        """
        own, parameters = self._read(), self._parameters
        values = [(parameters[n], value) for n, state in own["state"].items() for value in state.values()]
        self._shards.write_together(lambda: self._write(own, path), values)

    def _write(self, own: dict[str, Any], path: Path) -> None:
        parameters = self._parameters
        blank = {
            number: {name: self._blank(parameters[number], value) for name, value in values.items()}
            for number, values in own["state"].items()
        }
        with atomic_path(path) as temporary:
            with torch.serialization.skip_data():
                torch.save({**own, "state": blank}, temporary)
            if hasattr(os, "posix_fallocate"):  # where the disk is full, writing to a mapped file ends the process
                with temporary.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            with torch.serialization.set_default_mmap_options(MAP_SHARED):
                mapped = torch.load(temporary, mmap=True, weights_only=True)
            for number, values in own["state"].items():
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        mapped["state"][number][name].copy_(whole(value))

    def _blank(self, parameter: nn.Parameter, value: Any) -> Any:
        """Return a tensor of the size that is written; its memory is never touched, and so takes none."""
        if not isinstance(value, Tensor):
            return value
        is_part = self._shards.has_part(parameter, value)
        shape = self._shards.whole_shape(parameter) if is_part else value.shape
        return torch.empty(shape, dtype=value.dtype)
