"""Try an optimizer on small tensors, to find one that cannot train before anything is loaded."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optim.optimizers import OptimizerChoice
from library.optim.pieces import Pieces
from library.optim.states import keep_state_dtypes
from library.optim.two_weights import has_modes, use_weights

#: only matrices, in pairs as in a LoRA, because some optimizers accept nothing else; 8-bit states need 4096 values
_SHAPES = ((8, 640), (640, 8), (4, 6), (6, 4))
_STEPS = 3
#: some optimizers first gather statistics of gradients
_STEPS_UNTIL_CHANGE = 12
#: used if the learning rate is 0, because a part of the model may have another
_SOME_RATE = 1e-3


class _Tried:
    """An optimizer over small parameters in two groups; the first parameter is 0, so that any update shows."""

    def __init__(self, choice: OptimizerChoice, device: torch.device) -> None:
        if choice.learning_rate == 0:
            choice = replace(choice, learning_rate=_SOME_RATE)
        self.parameters = [nn.Parameter(_numbers(n, shape, device) * (n > 0)) for n, shape in enumerate(_SHAPES)]
        self.optimizer = choice.create([{"params": self.parameters[:2]}, {"params": self.parameters[2:]}])
        keep_state_dtypes(self.optimizer)
        use_weights(self.optimizer, for_training=True)

    def step(self, step: int, *, in_pieces: bool = False, skipped: int | None = None) -> None:
        """Take a step without a gradient of the parameter ``skipped``."""
        for number, parameter in enumerate(self.parameters):
            # along one direction, so that optimizers that find a learning rate raise it
            gradient = _numbers(number, tuple(parameter.shape), parameter.device) * (1 + 0.1 * step) * 10.0**-number
            parameter.grad = None if number == skipped else gradient
        if not in_pieces:
            self.optimizer.step()
            return
        pieces = Pieces(self.optimizer)
        for parameter in reversed(self.parameters):
            if parameter.grad is not None:
                pieces.update([parameter])
                parameter.grad = None
        pieces.end_step()

    @property
    def has_changed(self) -> bool:
        return bool(self.parameters[0].detach().any())

    def values(self) -> list[object]:
        """Return the weights and the groups' values."""
        groups = [value for g in self.optimizer.param_groups for name, value in g.items() if name != "params"]
        return [*(p.detach() for p in self.parameters), *groups]


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the run's random state, and suppress warnings about tensors on the host."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def is_schedule_free(choice: OptimizerChoice) -> bool:
    """Whether an optimizer needs no schedule and has other weights for use than for training.

    Defazio et al. 2024 (arXiv:2405.15682).

    The optimizer object decides, because packages use different class names.
    """
    with _quietly():
        tried = _Tried(choice, torch.device("cpu"))
        if not has_modes(tried.optimizer):
            return False
        try:
            for step in range(_STEPS_UNTIL_CHANGE):
                tried.step(step)
        except Exception:  # ``check_by_trial`` reports what is wrong with it
            return False
        trained = tried.parameters[0].detach().clone()
        use_weights(tried.optimizer, for_training=False)
        return not torch.equal(tried.parameters[0].detach(), trained)


def updates_alone(choice: OptimizerChoice, device: torch.device) -> bool:
    """Whether steps in pieces equal whole steps (``library.optim.pieces``)."""

    def trained(*, in_pieces: bool) -> list[object]:
        tried = _Tried(choice, device)
        for step in range(_STEPS):
            tried.step(step, in_pieces=in_pieces, skipped=1 if step == 1 else None)
        return tried.values()

    try:
        with _quietly():
            return _are_same(trained(in_pieces=False), trained(in_pieces=True))
    except Exception:  # a third-party class, which may not expect such groups
        return False


def keeps_memory_format(choice: OptimizerChoice, device: torch.device) -> bool:
    """Whether a step leaves weights in the memory format that they have; bitsandbytes makes them contiguous."""
    weight = nn.Parameter(_numbers(0, (8, 8, 9, 9), device).to(memory_format=torch.channels_last))
    strides = weight.stride()
    try:
        with _quietly():
            optimizer = choice.create([{"params": [weight]}])
            use_weights(optimizer, for_training=True)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    except Exception:  # some take matrices alone
        return True
    return weight.stride() == strides


def check_by_trial(choice: OptimizerChoice, device: torch.device, *, keeps_states: bool) -> list[str]:
    """Take some steps, and restore a saved state; returns warnings.

    Args:
        keeps_states: whether the options ask for states.

    Raises:
        UserError: the optimizer cannot train here, or its states cannot be restored and ``keeps_states``.
    """
    with _quietly():
        tried = _Tried(choice, device)
        try:
            # accelerate does so with every new optimizer
            tried.optimizer.load_state_dict(tried.optimizer.state_dict())
            for step in range(_STEPS_UNTIL_CHANGE):
                if step < _STEPS or not tried.has_changed:
                    tried.step(step)
        except Exception as error:
            raise UserError(
                f"--optimizer_type {choice.name}: it cannot be used for training here: a step on a small tensor fails "
                f"with {_one_line(error)}; choose another one"
            ) from error
        if not tried.has_changed:
            raise UserError(
                f"--optimizer_type {choice.name}: it cannot be used for training here: {_STEPS_UNTIL_CHANGE} steps on "
                "a small tensor change nothing; choose another one, or other --optimizer_args"
            )
        try:
            is_exact = _resumes_exactly(choice, tried, device)
        except Exception as error:
            text = (
                f"--optimizer_type {choice.name}: a state of it cannot be restored ({_one_line(error)}), so that a run "
                "cannot be resumed"
            )
            if keeps_states:
                raise UserError(f"{text}; choose another one, or save and resume no states") from error
            return [text]
    if not is_exact:
        return [f"--optimizer_type {choice.name}: a resumed run continues, but not exactly like an uninterrupted run"]
    return []


def _resumes_exactly(choice: OptimizerChoice, tried: _Tried, device: torch.device) -> bool:
    """Whether an optimizer that loads the state of another takes the same step."""
    other = _Tried(choice, device)
    other.optimizer.load_state_dict(saved_and_read(tried.optimizer.state_dict(), device))
    with torch.no_grad():
        for parameter, value in zip(other.parameters, tried.parameters, strict=True):
            parameter.copy_(value)
    for one in (tried, other):
        torch.manual_seed(1)
        one.step(_STEPS_UNTIL_CHANGE)
    return all(map(torch.equal, (p.detach() for p in tried.parameters), (p.detach() for p in other.parameters)))


def check_change(before: OptimizerChoice, now: OptimizerChoice, device: torch.device) -> None:
    """Check whether a state that was saved with other arguments can be resumed. Raises UserError if not."""
    with _quietly():
        try:
            tried, other = _Tried(before, device), _Tried(now, device)
            for step in range(_STEPS):
                tried.step(step)
            changed = changed_values(before, now)
            other.optimizer.load_state_dict(saved_and_read(tried.optimizer.state_dict(), device))
            for group in other.optimizer.param_groups:
                group.update(changed)
            other.step(_STEPS)
        except Exception as error:
            raise UserError(
                f"--resume: the state was saved with the optimizer {before.metadata_name}, which {now.metadata_name} "
                f"cannot continue from ({_one_line(error)}); give the --optimizer_args of that run"
            ) from error


def changed_values(before: OptimizerChoice, now: OptimizerChoice) -> dict[str, Any]:
    """Return the values of a new parameter group that differ between the arguments of ``now`` and ``before``."""
    groups = [
        choice.create([{"params": [nn.Parameter(torch.zeros(2, 2))]}]).param_groups[0] for choice in (before, now)
    ]
    return {
        name: value
        for name, value in groups[1].items()
        if name not in ("params", "lr") and not (name in groups[0] and _is_same(groups[0][name], value))
    }


def saved_and_read(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a state after saving and loading it."""
    from accelerate.utils.other import load

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    # one of several processes on a CPU has the device "cpu:0", which torch cannot load to
    return load(file, map_location="cpu" if device.type == "cpu" else device)


def _numbers(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _are_same(one: list[object], other: list[object]) -> bool:
    return len(one) == len(other) and all(map(_is_same, one, other))


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _one_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values"
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
