"""Update parameters as soon as their gradients are computed, within the backward pass.

Gradients then never exist all at once: each part of the parameters is updated, and its gradients are freed, when the
last gradient of the part has arrived. A part is a single parameter (``--fused_backward_pass``), one of N groups, or a
block of the model. The result is that of the usual step, bit for bit. Features that need all gradients together
(clipping, averaging over processes, loss scaling, skipping a step) exclude it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from library.errors import UserError
from library.optim.pieces import Pieces

#: parameters that are updated together
Part = Sequence[nn.Parameter]


def one_by_one(parameters: Sequence[nn.Parameter]) -> list[Part]:
    """Return one part per parameter."""
    return [[parameter] for parameter in parameters]


def in_groups(parameters: Sequence[nn.Parameter], count: int) -> list[Part]:
    """Return at most ``count`` parts with equal numbers of parameters, in their order."""
    size = max(1, math.ceil(len(parameters) / count))
    return [parameters[start : start + size] for start in range(0, len(parameters), size)]


def by_block(parameters: Sequence[nn.Parameter], blocks: Sequence[nn.Module]) -> list[Part]:
    """Return the parameters of each block, and those outside of blocks."""
    part_of = {p: number for number, block in enumerate(blocks) for p in block.parameters()}
    parts: dict[int | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        parts.setdefault(part_of.get(parameter), []).append(parameter)
    return list(parts.values())


class FusedBackward:
    """Hooks that update each part in the last backward pass of a step. ``Pieces.end_step`` updates the rest.

    Args:
        parts: of parameters that are on their device already.
    """

    def __init__(self, pieces: Pieces, parts: Sequence[Part]) -> None:
        self._pieces = pieces
        self._parts = [list(part) for part in parts]
        self._waiting = [0] * len(self._parts)
        self._is_last = False
        for number, part in enumerate(self._parts):
            for parameter in part:
                # some networks train a part of their parameters in each step; hooks need requires_grad
                trained = parameter.requires_grad
                parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._hook(number))
                parameter.requires_grad_(trained)

    def before_backward(self, *, is_last: bool) -> None:
        """Prepare for a backward pass.

        Args:
            is_last: whether it is the last of this step.
        """
        self._is_last = is_last
        self._waiting = [sum(p.requires_grad for p in part) for part in self._parts]

    def _hook(self, number: int) -> Callable[[nn.Parameter], None]:
        def arrived(_: nn.Parameter) -> None:
            if not self._is_last:
                return
            self._waiting[number] -= 1
            if self._waiting[number] == 0:
                part = [p for p in self._parts[number] if p.grad is not None]
                self._pieces.update(part)
                for parameter in part:
                    parameter.grad = None

        return arrived


def check_fusible(name: str, alone: bool, flag: str) -> None:
    """Raise UserError for an optimizer that needs all gradients at once.

    Args:
        name: of the optimizer.
        alone: see ``library.optim.trial.updates_alone``.
        flag: the option that asks for it.
    """
    if not alone:
        raise UserError(
            f"{flag}: --optimizer_type {name} does not update every parameter by itself, so the result would be "
            f"another; use Adafactor, Lion or an optimizer of torch or bitsandbytes, or remove {flag}"
        )
