"""One step of an optimizer, taken over its parameters piece by piece.

The result is that of one step over all parameters, bit for bit, for an optimizer that updates each parameter by that
parameter's gradient and state, and by values of its group that every parameter finds alike (learning rate, counts of
steps, sums of weights). ``updates_alone`` finds out by trial whether an optimizer is of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError

if TYPE_CHECKING:
    from library.optim.optimizers import OptimizerChoice

Group = dict[str, Any]


class Pieces:
    """Steps an optimizer over some parameters at a time; ``end_step`` completes the step.

    Groups are looked up by their place whenever they are used: loading a state replaces them.

    Args:
        step: the optimizer's step as it is when a piece is updated, if not given.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], object] | None = None) -> None:
        self._optimizer = optimizer
        self._step = step
        self._group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        #: for each group of which a piece was updated in this step, the values that the piece left in it
        self._after: dict[int, Group] = {}

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Step the optimizer over these parameters alone, each at most once a step."""
        chosen: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            chosen.setdefault(self._group_of[parameter], []).append(parameter)
        self._update(chosen)

    @torch.no_grad()
    def end_step(self) -> None:
        """Update what is left, and let each group take over the values that its pieces left."""
        groups = self._optimizer.param_groups
        # a group whose parameters all lack gradients still counts the step
        rest = {index: group["params"] for index, group in enumerate(groups) if index not in self._after}
        for index in self._after:
            if left := [p for p in groups[index]["params"] if p.grad is not None]:
                rest[index] = left
        if rest:
            self._update(rest)
        for index, values in self._after.items():
            groups[index].update(values)
        self._after.clear()

    def _update(self, chosen: Mapping[int, Sequence[nn.Parameter]]) -> None:
        groups = self._optimizer.param_groups
        # copies: each piece begins with the values that the group had before the step
        pieces = [{**groups[index], "params": list(chosen[index])} for index in sorted(chosen)]
        self._optimizer.param_groups = pieces
        try:
            (self._step or self._optimizer.step)()
        finally:
            self._optimizer.param_groups = groups
        for index, piece in zip(sorted(chosen), pieces, strict=True):
            self._after[index] = {name: value for name, value in piece.items() if name != "params"}


# ---- whether an optimizer can be used so ----

#: matrices alone, as some optimizers take nothing else; 8-bit states are used from 4096 values on
_TRIAL_SHAPES = ((64, 80), (3, 5), (4, 4))
_TRIAL_STEPS = 3


def updates_alone(choice: OptimizerChoice, device: torch.device) -> bool:
    """Whether steps in pieces equal whole steps, by trial on small tensors. Optimizers that fail at it do not."""
    try:
        with torch.random.fork_rng(devices=[]):
            whole, pieces = (_trial(choice, device, in_pieces=in_pieces) for in_pieces in (False, True))
        return len(whole) == len(pieces) and all(map(_is_same, whole, pieces))
    except (UserError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError):
        return False


def _trial(choice: OptimizerChoice, device: torch.device, *, in_pieces: bool) -> list[object]:
    """The weights and the groups' values after some steps, in the second of which one parameter has no gradient."""
    parameters = [nn.Parameter(_numbers(n, shape, device)) for n, shape in enumerate(_TRIAL_SHAPES)]
    optimizer = choice.create([{"params": parameters[:2]}, {"params": parameters[2:]}])
    choice.set_training(optimizer, True)
    pieces = Pieces(optimizer)
    torch.manual_seed(0)
    for step in range(_TRIAL_STEPS):
        for number, parameter in enumerate(parameters):
            # along one direction, by which those that find a learning rate raise it
            gradient = _numbers(number, tuple(parameter.shape), device) * (1 + 0.1 * step) * 10.0**-number
            parameter.grad = None if (step, number) == (1, 1) else gradient
        if not in_pieces:
            optimizer.step()
            continue
        for parameter in reversed(parameters):
            if parameter.grad is not None:
                pieces.update([parameter])
                parameter.grad = None
        pieces.end_step()
    values = [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
    return [*(p.detach() for p in parameters), *values]


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def _numbers(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
