"""Train in half precision with float32 updates that are rounded stochastically (``--full_bf16``, ``--full_fp16``).

A number between two neighbours of a format is rounded up with a probability equal to its relative distance from the
lower one, so that the expected result is the number itself:

    P(up) = (x - down) / (up - down)

Plain rounding loses every update below half of that spacing: a bfloat16 weight of 1 cannot move by less than 0.002.
Rounded stochastically, small updates add up on average. Gupta et al. 2015, "Deep Learning with Limited Numerical
Precision" (arXiv:1502.02551), section 3; for bfloat16 weights Zamirai et al. 2020, "Revisiting BFloat16 Training"
(arXiv:2010.06192), section 4.1.

Parameters, gradients and the optimizer's tensors of the parameters' shape are kept in half precision. For an update
they are converted to float32, some parameters at a time where the optimizer allows it, which bounds the memory. Random
numbers are keyed by the run's seed, the number of updates, which the optimizer's state holds, and the parameter's
index: a resumed run rounds exactly as the uninterrupted one, and all processes round alike, save their parts of sharded
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor

from library.optim.layout import laid_out_as
from library.optim.pieces import Pieces
from library.randomness import key

#: in the optimizer's parameter groups, and so in its state: updates done
UPDATES = "rounded_updates"

_HALVES = (torch.bfloat16, torch.float16)

#: elements that are float32 at the same time, where the optimizer can step over some parameters at a time
_MOST_AT_ONCE = 2**26


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 ``values`` to ``dtype`` (bfloat16 or float16), up or down so that the mean is kept.

    Numbers that ``dtype`` can represent stay; those that are not finite, or beyond its range, are rounded as usual.

    Args:
        generator: on the device of ``values``.
    """
    if dtype == torch.bfloat16:
        # a bfloat16 is the upper half of a float32: adding a random lower half carries over with the right probability
        draws = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
        rounded = draws.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
        return laid_out_as(values, torch.where(values.isfinite(), rounded, values).to(dtype))
    nearest = values.to(dtype)
    error = values - nearest.float()
    # the neighbour on the other side of the value: the bits of a format are ordered by magnitude
    bits = nearest.view(torch.int16)
    step = torch.where((error > 0) ^ (nearest < 0), 1, -1).to(torch.int16)
    smallest = torch.where(error < 0, torch.iinfo(torch.int16).min + 1, 1).to(torch.int16)  # -0...01 and 0...01
    other = torch.where(nearest == 0, smallest, bits + step).view(dtype)
    chance = error / (other.float() - nearest.float())
    uniform = torch.rand(values.shape, generator=generator, device=values.device)
    # false where the probability is NaN, from infinite or NaN values
    return laid_out_as(values, torch.where((uniform < chance) & (error != 0), other, nearest))


def train_in_half(
    optimizer: torch.optim.Optimizer, seed: int, *, alone: bool, ranks: Mapping[Tensor, int] = MappingProxyType({})
) -> None:
    """Make ``optimizer.step`` update half-precision parameters in float32 and round the results stochastically.

    Parameters in float32 are stepped as usual. States must be loaded with their own dtypes, see
    ``library.optim.states``.

    Args:
        optimizer: before its first step, and before a scheduler or the accelerator wraps it.
        seed: of the run, the same on all processes.
        alone: see ``library.optim.trial.updates_alone``; a step is then taken in pieces, to save memory.
        ranks: for parameters of which each process has another part, its rank: their draws differ.
    """
    step = optimizer.step
    places = {p: place for place, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}

    def rounded_step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        # the present groups: a part of all, where the update is fused into the backward pass
        groups = self.param_groups
        update = int(groups[0].get(UPDATES, 0))  # states of other runs do not have it
        halves = [p for group in groups for p in group["params"] if p.dtype in _HALVES and p.grad is not None]
        parts = _parts(halves) if alone else [halves]

        def widened_step(part: Sequence[Tensor], step: Callable[[], Any]) -> Any:
            homes = {p: _widen(p, self.state.get(p, {})) for p in part}
            try:
                return step()
            finally:
                for parameter, home in homes.items():
                    rank = (ranks[parameter],) if parameter in ranks else ()
                    draws = _generator(parameter.device, key(seed, "rounding", update, places[parameter], *rank))
                    _narrow(parameter, self.state.get(parameter, {}), home, draws)

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

    # a bound method, because torch's schedulers use its attributes
    optimizer.step = MethodType(rounded_step, optimizer)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _parts(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split parameters, in their order, into as few parts as possible of at most ``_MOST_AT_ONCE`` elements."""
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
    """Loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2) for float16 gradients.

    torch's own scaler refuses to unscale them before clipping.
    """

    def _unscale_grads_(self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def _widen(parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """Convert parameter, gradient and their half-precision state to float32; return the parameter's own memory."""
    home = parameter.data
    gradient, parameter.grad = parameter.grad, None
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == parameter.dtype:
            state[name] = value.float()
    parameter.data = parameter.data.float()
    parameter.grad = gradient.float()
    return home


def _narrow(parameter: Tensor, state: dict[str, Any], home: Tensor, generator: torch.Generator) -> None:
    """Write the rounded parameter to its own memory, and round state of its shape; free the used gradient."""
    dtype = home.dtype
    parameter.grad = None
    home.copy_(round_stochastically(parameter.data, dtype, generator))
    parameter.data = home
    for name, value in state.items():
        # rows, columns and counters stay in float32: they are small
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.shape == parameter.shape:
            state[name] = round_stochastically(value, dtype, generator)
