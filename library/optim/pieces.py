"""One step of an optimizer, taken over its parameters piece by piece.

The result is that of one step over all parameters, bit for bit, for an optimizer that updates each parameter by that
parameter's gradient and state, and by values of its group that every parameter finds alike (learning rate, counts of
steps, sums of weights). ``library.optim.trial`` finds out whether an optimizer is of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
