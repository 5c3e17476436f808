"""Shard the optimizer's states and update over processes with DeepSpeed's ZeRO (Rajbhandari et al. 2020).

DeepSpeed needs a module whose forward pass computes the loss. Adapters work inside the frozen model's layers, so there
is none; and the loop averages, clips and checks gradients, as in every run. So DeepSpeed gets a module of the trained
weights only, and the step's gradients through a loss that is linear in them. It averages values that are equal on all
processes, keeps its part, updates it, and gathers the new weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError

#: optimizers of torch.optim whose update is elementwise, so that flattened weights may be split anywhere
_OF_TORCH = ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")

#: elements that DeepSpeed reduces at once, for which it holds memory; its own default would be 2 GB
_MOST_AT_ONCE = 50_000_000


@dataclass(frozen=True)
class Zero:
    """The settings of sharding an optimizer."""

    stage: int  # 0 nothing; 1 the optimizer's states; 2 the averaged gradients too
    on_host: bool = False  # states and update in host memory
    #: further settings of DeepSpeed's ``zero_optimization``
    settings: Mapping[str, Any] = field(default_factory=dict)


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    given: str = "DeepSpeed gives it pieces of all weights in a row",
    instead: str = "leave DeepSpeed out",
) -> None:
    """Raise UserError for an optimizer that does not work on parts of weights.

    Args:
        given: what it gets, for the message.
        instead: what to do otherwise.
    """
    kind = type(optimizer)
    if kind in [getattr(torch.optim, name) for name in _OF_TORCH] or kind.__module__.startswith("lion_pytorch."):
        return
    raise UserError(
        f"--optimizer_type {kind.__name__}: {given}, and it looks at whole weights or is not known not to; use Lion or "
        f"one of {', '.join(_OF_TORCH)}, or {instead}"
    )


class _Given(torch.autograd.Function):
    """A loss of 0 whose gradient by a weight is that of the parameter, which is handed over."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parameter: nn.Parameter) -> Tensor:
        ctx.parameter = parameter
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.parameter.grad = ctx.parameter.grad, None
        return (torch.zeros_like(ctx.parameter) if gradient is None else gradient.contiguous().mul_(factor)), None


class _Weights(nn.Module):
    """The trained weights for DeepSpeed, whose ``forward`` makes a loss that has the parameters' gradients.

    They are parameters of their own, as DeepSpeed acts whenever one gets a gradient, which those of the model do for
    each batch.

    Args:
        copied: whether they have memory of their own; if not, the parameters' memory is theirs until ``lend``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, copied: bool) -> None:
        super().__init__()
        self._of = list(parameters)
        self._copied = copied
        self.weights = nn.ParameterList(
            [nn.Parameter(p.detach().clone() if copied else p.detach()) for p in parameters]
        )
        if not copied:
            for parameter in parameters:  # DeepSpeed moves all into one block, and frees what they had
                parameter.data = parameter.data.new_empty(0)

    def lend(self) -> None:
        """Give parameters the memory that DeepSpeed has laid the weights into."""
        if not self._copied:
            for parameter, weight in zip(self._of, self.weights, strict=True):
                parameter.data = weight.data

    @torch.no_grad()
    def exchange(self, *, to_model: bool) -> None:
        """Copy between the parameters and the weights, where they have memory of their own."""
        if self._copied:
            weights = [w.detach() for w in self.weights]
            torch._foreach_copy_(*((self._of, weights) if to_model else (weights, self._of)))

    def forward(self) -> Tensor:
        return torch.stack([_Given.apply(w, p) for w, p in zip(self.weights, self._of, strict=True)]).sum()


class ZeroOptimizer(torch.optim.Optimizer):
    """An optimizer with the interface of any other: groups of whole parameters, whole states; its work is sharded.

    All processes must create, step, save and load it together, with equal gradients.

    Args:
        optimizer: new, over float32 parameters on their device, in the same order on all processes.
        keeps_copies: whether the device has memory for a copy of the parameters. If not, DeepSpeed's block of memory
            becomes theirs; states must then be written tensor by tensor.

    Raises:
        UserError: see ``check_optimizer``; DeepSpeed cannot be used on this machine.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, zero: Zero, device: torch.device, *, keeps_copies: bool = True
    ) -> None:
        check_optimizer(optimizer)
        groups = [dict(group) for group in optimizer.param_groups if group["params"]]
        super().__init__(groups, dict(optimizer.defaults))
        self._device, self._is_split = device, zero.stage > 0
        self._inner = optimizer
        parameters = self._parameters()
        self._gathered_on = device if keeps_copies else torch.device("cpu")
        self._weights = _Weights(parameters, copied=keeps_copies)
        taken = iter(self._weights.weights)
        # in place: schedulers and hooks of its own would be lost with a new one
        optimizer.param_groups[:] = [{**g, "params": [next(taken) for _ in g["params"]]} for g in self.param_groups]
        self._engine = _start(self._weights, optimizer, zero, device)
        self._weights.lend()
        self.state = optimizer.state

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def numbers_here(self) -> int:
        """Return the number of trained numbers that this process updates; those of the last process may be padded."""
        return sum(p.numel() for group in self._inner.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights by their gradients, which must be the same on all processes.

        Raises:
            UserError: a network that leaves some of its weights out of a step.
        """
        parameters = self._parameters()
        if not all(p.requires_grad for p in parameters):
            raise UserError(
                "DeepSpeed: this network leaves some of its weights out of a step (as networks.dylora does), and "
                "DeepSpeed would move them all; leave DeepSpeed out"
            )
        for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
            own.update((name, value) for name, value in group.items() if name != "params")
        # something else may have changed weights: a state, a limit of norms, a step that was taken back
        if self._is_split:
            for group, own in zip(self.param_groups, self._inner.param_groups, strict=True):
                own["params"][0].copy_(self._piece(group["params"], own["params"][0]))
        else:
            self._weights.exchange(to_model=False)
        with torch.enable_grad():
            self._engine.backward(self._engine())
        self._engine.step()
        self._weights.exchange(to_model=True)

    # ---- whole states ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the same optimizer without DeepSpeed; all processes must call it."""
        groups, state, first = [], {}, 0
        inner = self._inner.state_dict()
        if not self._is_split:
            state = inner["state"]
        for index, group in enumerate(self.param_groups):
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": numbers})
            if self._is_split and inner["state"].get(index):
                wholes = self._whole(inner["state"][index], group["params"])
                state |= dict(zip(numbers, wholes, strict=True))
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, here or of an optimizer without DeepSpeed.

        Raises:
            UserError: the state is of other parameters.
        """
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise UserError("--resume: the state's optimizer has other parameters; resume with that run's options")
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update((name, value) for name, value in values.items() if name != "params")
        if self._is_split:
            state = {}
            for index, (_, values) in enumerate(zip(self.param_groups, saved, strict=True)):
                states = [state_dict["state"].get(number, {}) for number in values["params"]]
                if any(states):
                    state[index] = self._pieces(states, self._inner.param_groups[index]["params"][0])
            groups = [{**g, "params": [index]} for index, g in enumerate(saved)]
            state_dict = {"state": state, "param_groups": groups}
        self._inner.load_state_dict(dict(state_dict))
        self.state = self._inner.state

    def _piece(self, wholes: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return this process's part of tensors in a row, filled up with zeros."""
        size = like.numel()
        part = torch.zeros(size, dtype=wholes[0].dtype, device=wholes[0].device)
        begin = -size * torch.distributed.get_rank()  # of a tensor, counted from where the part begins
        for tensor in wholes:
            first, last = max(begin, 0), min(begin + tensor.numel(), size)
            if first < last:
                part[first:last] = tensor.detach().reshape(-1)[first - begin : last - begin]
            begin += tensor.numel()
        return part

    def _pieces(self, states: Sequence[Mapping[str, Any]], like: Tensor) -> dict[str, Any]:
        """The state of this process's part, of those of whole parameters."""
        found: dict[str, Any] = {}
        for name, first in states[0].items():
            values = [state.get(name) for state in states]
            if isinstance(first, Tensor) and first.dim() > 0 and all(isinstance(value, Tensor) for value in values):
                found[name] = self._piece(values, like)
            elif not all(_is_same(value, first) for value in values):
                raise UserError(
                    f"--resume: the state's parameters differ in {name}, and DeepSpeed has one for all; resume it "
                    "without DeepSpeed"
                )
            else:
                found[name] = first
        return found

    def _whole(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The states of parameters, of this process's and all others' parts of them."""
        found: list[dict[str, Any]] = [{} for _ in parameters]
        for name, value in state.items():
            if not (isinstance(value, Tensor) and value.dim() > 0):
                values: Sequence[Any] = [value.clone() if isinstance(value, Tensor) else value for _ in parameters]
            else:
                sizes = [p.numel() for p in parameters]
                cut = self._row(value)[: sum(sizes)].split(sizes)
                values = [part.view(p.shape).clone() for part, p in zip(cut, parameters, strict=True)]
            for one, whole in zip(found, values, strict=True):
                one[name] = whole
        return found

    def _row(self, part: Tensor) -> Tensor:
        """The parts of all processes in a row, gathered some numbers at a time."""
        size, processes = part.numel(), torch.distributed.get_world_size()
        row = torch.empty(size * processes, dtype=part.dtype, device=self._gathered_on)
        for start in range(0, size, _MOST_AT_ONCE):
            here = part[start : start + _MOST_AT_ONCE].to(self._device)  # where processes can exchange it
            pieces = [torch.empty_like(here) for _ in range(processes)]
            torch.distributed.all_gather(pieces, here)
            for rank, piece in enumerate(pieces):
                row[rank * size + start : rank * size + start + piece.numel()] = piece
        return row


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return one == other


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """Set the variable that DeepSpeed reads and that only launchers set."""
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]


def _start(weights: _Weights, optimizer: torch.optim.Optimizer, zero: Zero, device: torch.device) -> Any:
    """Return DeepSpeed's engine, without the features that this program has itself."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    if not torch.distributed.is_initialized():  # one process, started without a launcher
        store, backend = torch.distributed.HashStore(), "gloo" if device.type == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    total = sum(p.numel() for p in weights.parameters())
    shared_out: dict[str, Any] = {"reduce_bucket_size": min(total, _MOST_AT_ONCE), **zero.settings}
    shared_out["stage"] = zero.stage
    if zero.on_host:
        shared_out.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": device.type != "cpu"})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the loop has clipped; left out, it is 1
        "zero_optimization": shared_out,
        "zero_allow_untested_optimizer": True,  # see ``check_optimizer``
        "zero_force_ds_cpu_optimizer": False,  # the run's optimizer stays what it is on the host too
    }
    try:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
        if device.type == "cpu":
            # an exchange of its own that it would compile for a minute, and that is for inference
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with _local_rank():
            made = deepspeed.initialize(model=weights, optimizer=optimizer, config=config, dist_init_required=False)
    except Exception as error:  # it builds and probes much while it starts, and raises what that raises
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"DeepSpeed cannot be used here: {what}; see its installation notes, or train without it"
        ) from error
    return made[0]
