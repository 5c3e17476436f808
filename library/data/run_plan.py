"""The length of a run: batches, optimizer steps and epochs, and the position of a given step.

A *batch* is one forward and backward pass; a *step* is one optimizer update of ``gradient_accumulation_steps`` batches.
The last step of an epoch may have fewer: batches of two epochs are never joined, so every epoch starts at a step
boundary.

A run may start counting in the middle (``--initial_step``): either at that position of the data, or at the beginning of
the data, in which case that step is the plan's ``origin``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """The position of the next step in a run; all numbers count from 0."""

    epoch: int
    step_in_epoch: int
    batch_in_epoch: int


@dataclass(frozen=True)
class Origin:
    """The step and the epoch, both counted from 0, at which a run's data begin."""

    step: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class RunPlan:
    """The length of a run, known before anything is loaded."""

    batches_per_epoch: int  # of one process
    gradient_accumulation_steps: int
    total_steps: int
    origin: Origin = Origin()

    @staticmethod
    def make(
        *,
        batches_per_epoch: int,
        gradient_accumulation_steps: int,
        max_train_steps: int,
        max_train_epochs: int | None,
        origin: Origin = Origin(),
    ) -> RunPlan:
        """Make a plan; ``max_train_epochs`` wins over ``max_train_steps`` if it is given."""
        plan = RunPlan(batches_per_epoch, gradient_accumulation_steps, max_train_steps, origin)
        if max_train_epochs is None:
            return plan
        return replace(plan, total_steps=plan.steps_until(max_train_epochs))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps)

    @property
    def num_epochs(self) -> int:
        """Return the number of epochs; ``max_train_steps`` may end the last one early."""
        return self.epochs_begun(self.total_steps)

    def epochs_begun(self, step: int) -> int:
        """Return the number of epochs of the first ``step`` steps."""
        return self.origin.epoch + math.ceil((step - self.origin.step) / self.steps_per_epoch)

    def steps_until(self, epoch: int) -> int:
        """Return the steps done at the end of ``epoch``, counted from 1."""
        return self.origin.step + (epoch - self.origin.epoch) * self.steps_per_epoch

    def position(self, step: int) -> Position:
        """Return the position after ``step`` optimizer steps."""
        epoch, step_in_epoch = divmod(step - self.origin.step, self.steps_per_epoch)
        epoch += self.origin.epoch
        return Position(epoch, step_in_epoch, step_in_epoch * self.gradient_accumulation_steps)

    def step_of(self, epoch: int, batch_in_epoch: int) -> int:
        """Return the step, counted from 0, of a batch of an epoch: the inverse of ``position``."""
        return self.steps_until(epoch) + batch_in_epoch // self.gradient_accumulation_steps

    def batches_of_step(self, batch_in_epoch: int) -> int:
        """Return the number of batches of the step that starts at this batch."""
        return min(self.gradient_accumulation_steps, self.batches_per_epoch - batch_in_epoch)
