"""Half-precision training: float32 updates, rounded stochastically (``--full_bf16``, ``--full_fp16``).

A number between two neighbours of a format goes to the upper one with a probability of its distance from the lower
one, so that the expected result is the number itself:

    P(up) = (x - down) / (up - down)

Plain rounding loses every update below half of that spacing: a bfloat16 weight of 1 cannot move by less than 0.002.
Rounded stochastically, small updates add up on average. Gupta et al. 2015, "Deep Learning with Limited Numerical
Precision" (arXiv:1502.02551), section 3; for bfloat16 weights Zamirai et al. 2020, "Revisiting BFloat16 Training"
(arXiv:2010.06192), section 4.1.

Parameters, gradients and the optimizer's tensors of the parameters' shape are kept in half precision. For an update
they are float32, some parameters at a time where the optimizer allows that, which bounds the memory it takes.
Draws are keyed by the run's seed, the number of updates, which the optimizer's state holds, and the parameter's place:
a resumed run rounds exactly as the uninterrupted one, and all processes round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from library.optim.pieces import Pieces
from library.randomness import key

#: in the optimizer's parameter groups, and so in its state: updates done
UPDATES = "rounded_updates"

_HALVES = (torch.bfloat16, torch.float16)

#: numbers that are float32 at the same time, where the optimizer can step over some parameters at a time
_MOST_AT_ONCE = 2**26


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 ``values`` in ``dtype`` (bfloat16 or float16), each rounded up or down so that the mean is kept.

    Numbers of ``dtype`` stay as they are; what is not finite, or beyond its range, is rounded as usual.

    Args:
        generator: on the device of ``values``.
    """
    if dtype == torch.bfloat16:
        # a bfloat16 is the upper half of a float32: a random lower half carries over with just the right probability
        draws = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
        rounded = draws.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
        return torch.where(values.isfinite(), rounded, values).to(dtype)
    nearest = values.to(dtype)
    error = values - nearest.float()
    # the neighbour on the other side of the value: formats are ordered as their bits are, away from zero
    bits = nearest.view(torch.int16)
    step = torch.where((error > 0) ^ (nearest < 0), 1, -1).to(torch.int16)
    smallest = torch.where(error < 0, torch.iinfo(torch.int16).min + 1, 1).to(torch.int16)  # -0...01 and 0...01
    other = torch.where(nearest == 0, smallest, bits + step).view(dtype)
    chance = error / (other.float() - nearest.float())
    uniform = torch.rand(values.shape, generator=generator, device=values.device)
    # false where the chance is not a number: errors of infinite or NaN values
    return torch.where((uniform < chance) & (error != 0), other, nearest)


def train_in_half(optimizer: torch.optim.Optimizer, seed: int, *, alone: bool) -> None:
    """Make ``optimizer.step`` update half-precision parameters in float32 and round the results stochastically.

    Parameters in float32 are stepped as usual. States must be loaded with their own dtypes, see
    ``library.optim.states``.

    Args:
        optimizer: before its first step, and before a scheduler or the accelerator wraps it.
        seed: of the run, the same on all processes.
        alone: see ``library.optim.trial.updates_alone``; a step is then taken in pieces, to save memory.
    """
    step = optimizer.step
    places = {p: place for place, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}

    def rounded_step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        # those of the moment: a part of all, where the update is fused into the backward pass
        groups = self.param_groups
        update = int(groups[0].get(UPDATES, 0))  # states of other runs have none
        halves = [p for group in groups for p in group["params"] if p.dtype in _HALVES and p.grad is not None]
        parts = _parts(halves) if alone else [halves]

        def widened_step(part: Sequence[Tensor], step: Callable[[], Any]) -> Any:
            dtypes = {p: p.dtype for p in part}
            for parameter in part:
                _widen(parameter, self.state.get(parameter, {}))
            try:
                return step()
            finally:
                for parameter, dtype in dtypes.items():
                    draws = torch.Generator(device=parameter.device)
                    draws.manual_seed(key(seed, "rounding", update, places[parameter]))
                    _narrow(parameter, self.state.get(parameter, {}), dtype, draws)

        if len(parts) == 1:
            result = widened_step(halves, step if closure is None else lambda: step(closure))
        else:
            result, pieces = None, Pieces(self, step)
            for part in parts:
                widened_step(part, partial(pieces.update, part))
            pieces.end_step()
        for group in groups:
            group[UPDATES] = update + 1
        return result

    # a bound method, as torch's schedulers take it apart
    optimizer.step = MethodType(rounded_step, optimizer)  # type: ignore[method-assign]


def _parts(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters in their order, as few parts as possible that are not larger than ``_MOST_AT_ONCE``; at least one."""
    parts: list[list[Tensor]] = [[]]
    numbers = 0
    for parameter in parameters:
        numbers += parameter.numel()
        if parts[-1] and numbers > _MOST_AT_ONCE:
            parts.append([])
            numbers = parameter.numel()
        parts[-1].append(parameter)
    return parts


class HalfGradScaler(torch.amp.GradScaler):
    """Loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2) for gradients that are float16 themselves.

    torch's own refuses these when it unscales them before clipping.
    """

    def _unscale_grads_(self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def _widen(parameter: Tensor, state: dict[str, Any]) -> None:
    """Parameter, gradient and their half-precision state to float32, in place."""
    gradient, parameter.grad = parameter.grad, None
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == parameter.dtype:
            state[name] = value.float()
    parameter.data = parameter.data.float()
    parameter.grad = gradient.float()


def _narrow(parameter: Tensor, state: dict[str, Any], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Parameter and state of its shape to ``dtype``, in place; the gradient, which has been used, is let go."""
    parameter.grad = None
    parameter.data = round_stochastically(parameter.data, dtype, generator)
    for name, value in state.items():
        # rows, columns and counters stay in float32: they are small
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.shape == parameter.shape:
            state[name] = round_stochastically(value, dtype, generator)
