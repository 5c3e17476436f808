"""Find losses and gradients that are not finite, without waiting for the device, and react to them (``--on_nan``).

A step is *bad* when its loss, averaged over processes, or the norm of its gradients is not finite. The flag is computed
on the device and read with the step's metrics, one step later (``library.training.metrics``). Until then the weights
before the step are kept, so that the step can be repeated (``library.training.replay``). In full training, where the
device has no memory for a copy, nothing is kept, and a bad step is not recorded. ``skip`` and ``rollback`` then read
the flag before the update, which waits for the device once a step, and leave the whole update out.

``stop``
    The run ends when the flag is read; nothing has been saved since.
``skip``
    The update is not applied, by the device itself: gradients of a bad step are set to zero before the optimizer's
    step, and afterwards the weights are put back as they were. The optimizer's own state is then that of one step
    with a zero gradient: momenta shrink by their betas and its count continues, as does the learning rate's schedule.
``rollback``
    As ``skip``, and when the flag is read, weights, optimizer and averages return to the last snapshot, at most
    ``KEPT_EVERY`` steps and one old (``library.training.kept_state``). The data, the step count and the schedule
    continue, so the same batch does not come again, and file names and curves never go back.

With fp16, infinite gradients are usual: the gradient scaler skips such updates and halves its scale, so there only the
loss decides whether a step is bad.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.config.core.training import OnNan
from library.data.batch import Batch
from library.errors import UserError
from library.optim.flat import Flat, all_finite
from library.optim.update import Update
from library.training.kept_state import KeptState
from library.training.metrics import StepMetrics

if TYPE_CHECKING:
    from accelerate import Accelerator


#: bad steps in a row (for rollback: without a new snapshot in between) before the run stops in any case
MOST_IN_A_ROW = 10
_FLAG, _BATCH = "finite", "batch "


class NonFiniteLoss(UserError):
    """Training diverged; nothing after the last save is kept."""


@dataclass(frozen=True)
class BatchNote:
    """The description of a bad batch."""

    paths: list[str]
    captions: list[str]
    loss: float  # of this batch alone

    @property
    def finite(self) -> bool:
        return abs(self.loss) < float("inf")  # false for NaN, too


@dataclass(frozen=True)
class BadStep:
    """A step whose loss or gradients are not finite, from the view of one process."""

    step: int  # counted from 1
    values: dict[str, float]  # metrics over all processes
    batches: list[BatchNote]  # of this process
    weights: list[Tensor]  # the trained parameters before the step, in their order, on the device
    in_a_row: int


@dataclass
class _Pending:
    step: int
    batches: list[tuple[list[str], list[str]]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)  # flat, see Flat


class StepGuard:
    """Watches the steps of one run; the module's docstring explains the modes.

    With ``keeps_copies`` it keeps up to two copies of the trained weights on the device, in ``skip`` and ``rollback``
    one of the gradients; ``rollback`` keeps up to two of weights, optimizer and averages in host memory.

    Args:
        keeps_copies: whether the device has memory for copies; without, ``skip`` and ``rollback`` wait in each step.
    """

    def __init__(self, update: Update, accelerator: Accelerator, mode: OnNan, *, keeps_copies: bool = True) -> None:
        self.mode = mode
        self._keeps_copies = keeps_copies
        self._accelerator = accelerator
        self._update = update
        self._parameters = [p for p in update.parameters if p.requires_grad]
        self._scaled = accelerator.scaler is not None
        self._pending: deque[_Pending] = deque()
        self._flag: Tensor | None = None
        self._in_a_row = 0
        self._flat = Flat(self._parameters)
        self._kept = KeptState(update) if mode == "rollback" else None

    # ---- on the device, in the step ----

    def start(self, step: int) -> None:
        """Begin a step (counted from 1)."""
        if self._kept is not None:
            self._kept.start(step - 1)
        # before the backward pass, which updates weights with --fused_backward_pass
        before = self._flat.read(self._parameters) if self._keeps_copies else []
        self._pending.append(_Pending(step, before=before))

    def saw(self, batch: Batch, loss: Tensor) -> None:
        """Add one of the step's batches and its loss, detached."""
        now = self._pending[-1]
        now.batches.append((batch.paths, batch.captions))
        now.losses.append(loss)

    def saw_step(self, loss: Tensor) -> None:
        """Set the loss of the whole step, the same on all processes."""
        self._flag = torch.isfinite(loss.detach())

    def before_update(self, grad_norm: Tensor | None) -> bool:
        """Check the step's loss and gradient norm, which are the same on all processes.

        Returns:
            whether the update is made.
        """
        flag = self._flag
        if not self._scaled:
            flag = flag & torch.isfinite(self._gradient_norm() if grad_norm is None else grad_norm)
        self._flag = flag
        if self.mode == "stop":
            return True
        if self._scaled:  # the scaler leaves out updates with infinite gradients by itself
            return True
        if not self._keeps_copies:
            return self._is_well_everywhere(flag)
        self._clear_gradients_unless(flag)
        return True

    def _is_well_everywhere(self, flag: Tensor) -> bool:
        """Read a flag now, on all processes alike; waits for the device."""
        if self._accelerator.num_processes > 1:
            flag = self._accelerator.reduce(flag.float(), reduction="mean") == 1
            self._flag = flag
        return bool(flag)

    def after_update(self) -> dict[str, Tensor]:
        """Restore the weights of a bad step; returns values to read with the step's metrics."""
        now = self._pending[-1]
        if self.mode != "stop" and self._keeps_copies:
            after = self._flat.read(self._parameters)
            for flat in after:
                self._flag = self._flag & torch.isfinite(flat).all()
            chosen = [torch.where(self._flag, *pair) for pair in zip(after, now.before, strict=True)]
            self._flat.write(chosen, self._parameters)
        losses = {f"{_BATCH}{index}": loss for index, loss in enumerate(now.losses)}
        return {_FLAG: self._flag, **losses}

    def step_ended(self, step: int) -> None:
        """Called after everything that follows an update, such as averages."""
        if self._kept is not None:
            self._kept.step_ended(step)

    def _gradient_norm(self) -> Tensor:
        if self._update.shards:
            return self._update.shards.norm(self._parameters)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:  # module dropout may drop all
            return torch.zeros((), device=self._parameters[0].device)
        return torch.stack([n.float() for n in torch._foreach_norm(gradients)]).sum()

    def _clear_gradients_unless(self, flag: Tensor) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = Flat(gradients)
        flat.write([torch.where(flag, g, torch.zeros_like(g)) for g in flat.read(gradients)], gradients)

    # ---- on the host, one step later ----

    def judge(self, metrics: StepMetrics) -> BadStep | None:
        """Remove the guard's own metrics, and return whether the step was bad."""
        now = self._pending.popleft()
        flag = metrics.values.pop(_FLAG)
        losses = [metrics.values.pop(f"{_BATCH}{index}") for index in range(len(now.losses))]
        if flag:
            if self._kept is None or self._kept.confirm(metrics.step):
                self._in_a_row = 0
            return None
        return self._bad(now, metrics.values, losses)

    def check(self, step: int) -> BadStep | None:
        """Check weights, averages and optimizer before a save, with all metrics read. Waits for the device."""
        self._update.settle()
        state = self._update.optimizer.state.values()
        tensors = [*self._parameters, *(v for values in state for v in values.values() if isinstance(v, Tensor))]
        average = self._update.average  # which may be in host memory
        averages = list(average.state_dict().values()) if average is not None else []
        finite = all_finite(tensors)
        if averages:
            finite = finite & all_finite(averages).to(finite.device)
        if bool(self._update.shards.everywhere(finite)):
            return None
        return self._bad(_Pending(step), {"weights or optimizer": float("nan")}, [])

    def _bad(self, step: _Pending, values: dict[str, float], losses: list[float]) -> BadStep:
        self._in_a_row += 1
        notes = [BatchNote(*names, loss) for names, loss in zip(step.batches, losses, strict=True)]
        weights = self._flat.split(step.before, self._parameters) if step.before else []
        return BadStep(step.step, values, notes, weights, self._in_a_row)

    def ends_run(self, bad: BadStep) -> bool:
        """Whether the run ends after this step."""
        # a finding of ``check`` can no longer be skipped
        return self.mode == "stop" or bad.in_a_row >= MOST_IN_A_ROW or (self.mode == "skip" and not bad.batches)

    def roll_back(self) -> int:
        """Restore the snapshot; returns its step (counted from 1)."""
        assert self._kept is not None, "only rollback does it"
        return self._kept.restore()
