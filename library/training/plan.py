"""How long a run is: batches, optimizer steps and epochs, and where a given step lies.

A *batch* is one forward and backward pass; a *step* is one optimizer update, made of
``gradient_accumulation_steps`` batches. The last step of an epoch may be made of fewer: batches of
two epochs are never joined, so every epoch starts at a step boundary.

A run may begin its numbers in the middle (``--initial_step``). It does so either at that place of the data, or at the
beginning of the data, in which case that step is the plan's ``origin``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """Where in a run the next step starts; all numbers count from 0."""

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
    """The lengths of a run, known before anything is loaded."""

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
        """``max_train_epochs`` wins over ``max_train_steps`` when it is given."""
        plan = RunPlan(batches_per_epoch, gradient_accumulation_steps, max_train_steps, origin)
        if max_train_epochs is None:
            return plan
        return replace(plan, total_steps=plan.steps_until(max_train_epochs))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps)

    @property
    def num_epochs(self) -> int:
        """Epochs begun, the last of which may be cut short by ``max_train_steps``."""
        return self.epochs_begun(self.total_steps)

    def epochs_begun(self, step: int) -> int:
        """Epochs that the first ``step`` steps are part of."""
        return self.origin.epoch + math.ceil((step - self.origin.step) / self.steps_per_epoch)

    def steps_until(self, epoch: int) -> int:
        """Steps done when ``epoch``, counted from 1, has ended."""
        return self.origin.step + (epoch - self.origin.epoch) * self.steps_per_epoch

    def position(self, step: int) -> Position:
        """Where the run stands after ``step`` optimizer steps."""
        epoch, step_in_epoch = divmod(step - self.origin.step, self.steps_per_epoch)
        epoch += self.origin.epoch
        return Position(epoch, step_in_epoch, step_in_epoch * self.gradient_accumulation_steps)

    def step_of(self, epoch: int, batch_in_epoch: int) -> int:
        """The step, counted from 0, that a batch of an epoch is part of: the inverse of ``position``."""
        return self.steps_until(epoch) + batch_in_epoch // self.gradient_accumulation_steps

    def batches_of_step(self, batch_in_epoch: int) -> int:
        """How many batches the step that starts at this batch is made of."""
        return min(self.gradient_accumulation_steps, self.batches_per_epoch - batch_in_epoch)
