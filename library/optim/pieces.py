"""Take one step of an optimizer over its parameters piece by piece.

The result is that of one step over all parameters, bit for bit, for an optimizer whose update of a parameter depends on
its gradient and state, and on values of its group that are the same for every parameter (learning rate, step counts,
sums of weights). ``library.optim.trial`` checks whether an optimizer is of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Group = dict[str, Any]


class Pieces:
    """Steps an optimizer over some parameters at a time; ``end_step`` completes the step.

    Groups are looked up by index whenever they are used, because loading a state replaces them.

    Args:
        step: the step function; if not given, the optimizer's at the time of the update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], object] | None = None) -> None:
        self._optimizer = optimizer
        self._step = step
        self._group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        #: for each group with an updated piece in this step, the group's values afterwards
        self._after: dict[int, Group] = {}

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Step the optimizer over these parameters only, each at most once per step."""
        chosen: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            chosen.setdefault(self._group_of[parameter], []).append(parameter)
        self._update(chosen)

    @torch.no_grad()
    def end_step(self) -> None:
        """Update the remaining parameters, and set each group to its values after the pieces."""
        groups = self._optimizer.param_groups
        # a group without gradients still counts the step
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
