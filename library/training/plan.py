"""How long a run is: batches, optimizer steps and epochs, and where a given step lies.

A *batch* is one forward and backward pass; a *step* is one optimizer update, made of
``gradient_accumulation_steps`` batches. The last step of an epoch may be made of fewer: batches of
two epochs are never joined, so every epoch starts at a step boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where in a run the next step starts; all numbers count from 0."""

    epoch: int
    step_in_epoch: int
    batch_in_epoch: int


@dataclass(frozen=True)
class RunPlan:
    """The lengths of a run, known before anything is loaded."""

    batches_per_epoch: int  # of one process
    gradient_accumulation_steps: int
    total_steps: int

    @staticmethod
    def make(
        *,
        batches_per_epoch: int,
        gradient_accumulation_steps: int,
        max_train_steps: int,
        max_train_epochs: int | None,
    ) -> RunPlan:
        """``max_train_epochs`` wins over ``max_train_steps`` when it is given."""
        steps_per_epoch = math.ceil(batches_per_epoch / gradient_accumulation_steps)
        total = max_train_steps if max_train_epochs is None else max_train_epochs * steps_per_epoch
        return RunPlan(batches_per_epoch, gradient_accumulation_steps, total)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps)

    @property
    def num_epochs(self) -> int:
        """Epochs begun, the last of which may be cut short by ``max_train_steps``."""
        return self.epochs_begun(self.total_steps)

    def epochs_begun(self, step: int) -> int:
        """Epochs that the first ``step`` steps are part of."""
        return math.ceil(step / self.steps_per_epoch)

    def position(self, step: int) -> Position:
        """Where the run stands after ``step`` optimizer steps."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return Position(epoch, step_in_epoch, step_in_epoch * self.gradient_accumulation_steps)

    def step_of(self, epoch: int, batch_in_epoch: int) -> int:
        """The step, counted from 0, that a batch of an epoch is part of: the inverse of ``position``."""
        return epoch * self.steps_per_epoch + batch_in_epoch // self.gradient_accumulation_steps

    def batches_of_step(self, batch_in_epoch: int) -> int:
        """How many batches the step that starts at this batch is made of."""
        return min(self.gradient_accumulation_steps, self.batches_per_epoch - batch_in_epoch)
