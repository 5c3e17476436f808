"""Validation: the loss on held-out images, early stopping and best weights.

Each image is evaluated at the same timesteps with the same noise every time, so losses differ by the weights alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.config.arguments import ValidationOptions
from library.config.work_progress import WorkProgress
from library.data.batch import Batch
from library.data.dataset_spec import DatasetConfig
from library.data.idle_options import NO_VALIDATION
from library.data.run_plan import RunPlan
from library.data.validation_data import ValidationData
from library.errors import UserError
from library.inference.generate import undisturbed
from library.randomness import key
from library.training.batch_losses import BatchLosses
from library.training.kinds.base import Kind
from library.training.logs import Trackers
from library.training.models import Models
from library.training.resume import TrainState
from library.training.saving import Saver
from library.training.step import NoiseSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

#: timesteps at which every image is evaluated
TIMESTEPS = 4


def check_validation(config: DatasetConfig, options: ValidationOptions, resumed: TrainState | None = None) -> None:
    """Refuse options that need validation if no images are held out.

    Raises:
        UserError: one line for each option; or early stopping already ended the run of the state.
    """
    if config.validates:
        patience, misses = options.early_stopping_patience, BestSoFar.of(resumed).misses
        if patience is not None and misses >= patience:
            raise UserError(
                f"--early_stopping_patience {patience}: the state of --resume has seen {misses} validations without a "
                "new lowest loss already; raise it, or remove it to continue"
            )
        return
    needing = [
        f"--{name}: cannot work {NO_VALIDATION}"
        for name in ("early_stopping_patience", "save_best")
        if getattr(options, name) not in (None, False)
    ]
    if needing:
        raise UserError("\n".join(needing))


@dataclass(frozen=True)
class ValidationPolicy:
    """The times of validation: by steps, by epochs, and at the end."""

    plan: RunPlan
    every_n_steps: int | None
    every_n_epochs: int | None  # each, if not given

    def axes(self, step: int) -> tuple[str, ...]:
        """Return the curves of a validation after this step (counted from 1): "step", "epoch", both or none."""
        by_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        position = self.plan.position(step)
        by_epoch = position.step_in_epoch == 0 and position.epoch % (self.every_n_epochs or 1) == 0
        if not by_step and not by_epoch and step == self.plan.total_steps:
            by_step, by_epoch = self.every_n_steps is not None, self.every_n_steps is None
        return ("step",) * by_step + ("epoch",) * by_epoch


@dataclass
class BestSoFar:
    """The lowest validation loss of a run; part of its state."""

    loss: float = math.inf
    step: int = 0
    misses: int = 0  # validations in a row since then without improvement

    def add(self, loss: float, step: int) -> bool:
        """Add a loss and return whether it is the new best; NaN never is."""
        if loss < self.loss:
            self.loss, self.step, self.misses = loss, step, 0
            return True
        self.misses += 1
        return False

    @staticmethod
    def of(resumed: TrainState | None) -> BestSoFar:
        """Restore it from ``state``."""
        state = resumed.validation if resumed is not None else {}
        return BestSoFar(state.get("loss", math.inf), int(state.get("step", 0)), int(state.get("misses", 0)))

    def state(self) -> dict[str, float]:
        """Return JSON values; there is no loss before the first validation."""
        found: dict[str, float] = {"step": self.step, "misses": self.misses}
        return found | ({"loss": self.loss} if math.isfinite(self.loss) else {})


class Validation:
    """The validations of one run.

    Args:
        accelerator: of the run, as plan and options.
        models: in eval mode during validation.
        losses: of training.
        saver: of the best weights.
        data: of the images that are held out.
        noise: as in training, at the levels (timesteps, or their counterparts of flow models) that each image gets.
        best_file: of the best weights.
        loading: preparation of batches, as for training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        models: Models,
        kind: Kind,
        losses: BatchLosses,
        saver: Saver,
        options: ValidationOptions,
        *,
        data: ValidationData,
        plan: RunPlan,
        noise: NoiseSettings,
        levels: Sequence[int],
        best_file: Path,
        loading: Mapping[str, Any],
    ) -> None:
        self._accelerator = accelerator
        self._models = models
        self._kind = kind
        self._losses = losses
        self._loading = loading
        self._saver = saver
        self._options = options
        self._total_steps = plan.total_steps
        self._policy = ValidationPolicy(plan, options.validate_every_n_steps, options.validate_every_n_epochs)
        self._noise = noise
        self._levels = levels
        self._data = data
        self._best_file = best_file
        self.best = BestSoFar()
        #: whether patience is used up
        self.ends_run = False

    def restore(self, resumed: TrainState) -> None:
        """Resume from a state that ``check_validation`` has passed."""
        self.best = BestSoFar.of(resumed)
        if self.best.step and self._options.save_best and not self._best_file.exists():
            logger.warning(
                "--save_best: %s is not there; it is written at the next loss below %.6f, that of step %d",
                *(self._best_file, self.best.loss, self.best.step),
            )

    def is_due(self, step: int) -> bool:
        """Whether ``after_step`` will validate."""
        return bool(self._policy.axes(step))

    def after_step(self, step: int, epoch: int, *, training_loss: float, trackers: Trackers) -> None:
        """Validate if it is due, record it, and keep the best weights; all processes take part.

        Args:
            step: done, counted from 1.
            epoch: of the step, counted from 1.
            training_loss: the running mean, for the divergence.
        """
        axes = self._policy.axes(step)
        if not axes:
            return
        started = time.monotonic()
        self._saver.set_training(False)
        loss = self._mean_loss()
        self._saver.set_training(True)
        is_best = self.best.add(loss, step)
        if is_best and self._options.save_best:
            self._saver.save_weights(self._best_file, step=step, epoch=epoch)
        for axis in axes:
            metrics = {
                f"loss/validation/{axis}_average": loss,
                f"loss/validation/{axis}_divergence": loss - training_loss,
            }
            if axis == "epoch":
                trackers.log_by_epoch(metrics, step=step, epoch=epoch)
            else:
                trackers.log(metrics, step)
        self.ends_run = self._is_out_of_patience() and step < self._total_steps
        if self._accelerator.is_main_process:
            self._say(step, loss, is_best, time.monotonic() - started)

    def _is_out_of_patience(self) -> bool:
        patience = self._options.early_stopping_patience
        return patience is not None and self.best.misses >= patience

    def _say(self, step: int, loss: float, is_best: bool, seconds: float) -> None:
        count = self._data.image_count
        comparison = "the lowest so far" if is_best else f"the lowest is {self.best.loss:.6f}, of step {self.best.step}"
        logger.info(
            "validation after step %d: loss %.6f on %d images (%s), %.1f s", step, loss, count, comparison, seconds
        )
        if not math.isfinite(loss):
            logger.warning("the validation loss of step %d is not finite, and counts as no better", step)
        if self.ends_run:
            logger.warning(
                "stopped early after step %d: no lower validation loss in %d validations "
                "(--early_stopping_patience); the lowest was %.6f, of step %d",
                *(step, self.best.misses, self.best.loss, self.best.step),
            )

    # ---- measuring ----

    def _mean_loss(self) -> float:
        """Return the mean over the images of all processes, each with the same weight, whatever its batch."""
        accelerator = self._accelerator
        losses = [torch.zeros(0, device=accelerator.device)]  # a process may have no batch
        modules = [*self._models.modules(), *self._kind.modules()]
        # plain lines, because the steps have the progress bar
        report = WorkProgress("validating", "batches", simple=True, enabled=accelerator.is_main_process)
        with torch.no_grad(), undisturbed(modules, accelerator.device):
            for done, batch in enumerate(self._data.batches(**self._loading), start=1):
                measured = self._of_batch(batch.to(accelerator.device, non_blocking=True))
                if done <= self._data.counted:
                    losses.append(measured)
                report.update(done, len(self._data))
        found = torch.cat(losses).cpu().double()
        total = torch.stack([found.sum(), torch.tensor(float(len(found)), dtype=torch.float64)])
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
        return float(total[0] / total[1])

    def _of_batch(self, batch: Batch) -> Tensor:
        """Return the loss of each image (B,), the mean over the fixed timesteps.

        It is the training loss, with its weights and masks, so that the two can be compared.
        """
        self._kind.begin_validation_batch(batch)
        with self._losses.autocast():
            latents, encoded = self._losses.encode(batch)
            at_each = [
                self._losses.at(
                    replace(batch, visits=[key(visit, "timestep", level) for visit in batch.visits]),
                    latents,
                    encoded,
                    noise=self._noise,
                    draw=None,
                    level=level,
                )
                for level in self._levels
            ]
        return torch.stack(at_each).mean(dim=0)  # (timesteps, B) -> (B,)
