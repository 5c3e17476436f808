"""The loop's hooks for one run: metrics to trackers, saves and their retention, previews."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.config.arguments import for_others
from library.data.dataset import Batch
from library.training.bad_steps import BadStepReport
from library.training.checkpoints import ema_path, remove_outdated
from library.training.logs import Progress, Trackers, print_summary
from library.training.metrics import DataWait, LossAverage, StepMetrics
from library.training.nonfinite import BadStep
from library.training.previews import PreviewPolicy, current_prompts, generate_previews, of_all_processes, preview_path
from library.training.processes import of_main_process

if TYPE_CHECKING:
    from library.training.run import Run
    from library.training.trainer import Trainer

logger = logging.getLogger(__name__)


class RunHooks:
    """Implements ``library.training.loop.LoopHooks``; steps and epochs count from 1."""

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self._trainer = trainer
        self._run = run
        self._average = LossAverage(run.plan.steps_per_epoch)
        self._previews = PreviewPolicy(
            every_n_steps=run.options.sample.steps_between,
            every_n_epochs=run.options.sample.epochs_between,
            at_first=run.options.sample.sample_at_first,
            prompts=run.checked.prompts,
        )
        self._prompts = current_prompts(trainer, run)
        self._data_wait = DataWait()
        self._rates: dict[int, dict[str, float]] = {}
        self._progress: Progress | None = None
        self._trackers: Trackers | None = None
        self._bad_steps = BadStepReport(run)

    # ---- the ends of a run ----

    def start(self) -> None:
        run = self._run
        main = run.accelerator.is_main_process
        simple = run.options.console.console_log_simple
        if run.checked.resumed is not None:
            self._average.restore(run.checked.resumed.losses)
        config = for_others(run.options) if run.options.logging.log_config else {}
        self._trackers = Trackers(run.accelerator, run.checked.trackers, config)
        if main:
            print_summary(self._trainer.summary(run), simple=simple)
        self._trainer.training_mode(run, True)
        if run.checked.resumed is None and self._previews.due_at_start():
            self._draw(step=run.start_step, epoch=None)
        if main:
            logger.info("first step: %d of %d", run.start_step + 1, run.plan.total_steps)
        self._progress = Progress(total=run.plan.total_steps, done=run.start_step, simple=simple, enabled=main)

    def close(self) -> None:
        if self._run.device.type == "cuda" and self._run.accelerator.is_main_process:
            logger.info("peak device memory: %.2f GB", torch.cuda.max_memory_allocated() / 1e9)
        if (share := self._data_wait.share) is not None and self._run.accelerator.is_main_process:
            advice = "; --cache_latents or more --max_data_loader_n_workers may help" if share > _LONG_WAIT else ""
            logger.info("waiting for data: %.1f%% of the time between steps%s", 100 * share, advice)
        if self._progress is not None:
            self._progress.close()
        if self._trackers is not None:
            self._trackers.close()

    @property
    def losses(self) -> list[float]:
        """The window of the running average, for the state folder."""
        return self._average.state()

    # ---- hooks ----

    def batches(self, epoch: int, start_batch: int) -> Iterable[Batch]:
        return self._trainer.batches(self._run, epoch, start_batch)

    def loss(self, batch: Batch) -> Tensor:
        return self._trainer.loss(self._run, batch)

    def epoch_started(self, epoch: int) -> None:
        self._trainer.epoch_started(self._run, epoch)

    def batch_started(self, batch: Batch) -> None:
        self._trainer.batch_started(self._run, batch)

    def step_ended(self, step: int, epoch: int) -> dict[str, Tensor]:
        self._rates[step] = self._run.update.learning_rates()
        return self._trainer.step_ended(self._run, step)

    def metrics_ready(self, metrics: StepMetrics) -> None:
        self._data_wait.add(metrics.values)
        loss = metrics.values["loss"]
        self._average.add(loss)
        entries = {"loss/current": loss, "loss/average": self._average.mean}
        entries |= {_TRACKER_NAMES.get(n, n): v for n, v in metrics.values.items() if n != "loss"}
        # rates are read when the step is taken, metrics one step later
        self._trackers.log(entries | self._rates.pop(metrics.step), step=metrics.step)
        position = self._run.plan.position(metrics.step - 1)
        self._progress.update(metrics.step, epoch=position.epoch + 1, loss=self._average.mean)

    def step_failed(self, bad: BadStep, *, ends_run: bool, back_to: int | None) -> None:
        self._rates.pop(bad.step, None)
        self._bad_steps(bad, ends_run=ends_run, back_to=back_to)

    def is_save_due(self, step: int) -> bool:
        validation, plan = self._run.validation, self._run.plan
        after = plan.position(step)
        ends_epoch = after.step_in_epoch == 0 and self._run.policy.saves_after_epoch(after.epoch, plan.num_epochs)
        by_step = self._run.policy.saves_after_step(step) or ends_epoch
        return by_step or (validation is not None and validation.is_due(step))

    def is_over(self) -> bool:
        return self._run.validation is not None and self._run.validation.ends_run

    def save_after_step(self, step: int, epoch: int) -> None:
        run, policy = self._run, self._run.policy
        # first, so that what is saved at this step knows of it
        if run.validation is not None:
            run.validation.after_step(step, epoch, training_loss=self._average.mean, trackers=self._trackers)
        if policy.saves_after_step(step):
            self._trainer.save(run, run.names.step(step), step=step, epoch=epoch)
            if policy.save_state:
                self._trainer.save_state(run, run.names.step_state(step), step=step, epoch=epoch, losses=self.losses)
            if run.accelerator.is_main_process:
                if (old := policy.step_to_remove(step)) is not None:
                    self._remove(run.names.step(old))
                if policy.save_state and (old := policy.step_state_to_remove(step)) is not None:
                    self._remove(run.names.step_state(old))
        if self._previews.due_after_step(step):
            self._draw(step=step, epoch=None)

    def save_after_epoch(self, step: int, epoch: int) -> None:
        run, policy = self._run, self._run.policy
        self._trackers.log_by_epoch({"loss/epoch_average": self._average.mean}, step=step, epoch=epoch)
        if policy.saves_after_epoch(epoch, run.plan.num_epochs):
            self._trainer.save(run, run.names.epoch(epoch), step=step, epoch=epoch)
            if policy.save_state:
                self._trainer.save_state(run, run.names.epoch_state(epoch), step=step, epoch=epoch, losses=self.losses)
            if run.accelerator.is_main_process:
                if (old := policy.epoch_to_remove(epoch)) is not None:
                    self._remove(run.names.epoch(old))
                if policy.save_state and (old := policy.epoch_state_to_remove(epoch)) is not None:
                    self._remove(run.names.epoch_state(old))
        if self._previews.due_after_epoch(epoch):
            self._draw(step=step, epoch=epoch)

    def interrupted(self, step: int, epoch: int) -> None:
        """Save weights and state so that nothing is lost, and say how to go on."""
        run = self._run
        weights, state = run.names.step(step), run.names.step_state(step)
        self._trainer.save(run, weights, step=step, epoch=epoch)
        self._trainer.save_state(run, state, step=step, epoch=epoch, losses=self.losses)
        if run.accelerator.is_main_process:
            logger.warning("stopped after step %d; go on with: --resume %s", step, state)

    def _remove(self, path: Path) -> None:
        """What is still on its way to the Hub is removed when it has arrived."""
        uploads = self._run.uploads
        # averages go with their weights, so both must have arrived
        uploads.when_free(ema_path(path), lambda _: uploads.when_free(path, remove_outdated))

    # ---- previews ----

    def _draw(self, *, step: int, epoch: int | None) -> None:
        run = self._run
        self._trainer.training_mode(run, False)
        images = generate_previews(
            of_main_process(self._prompts.current() if run.accelerator.is_main_process else ()),
            draw=lambda prompt, path: self._trainer.draw(run, prompt, path),
            path_of=lambda index, prompt: preview_path(
                run.names.directory, run.names.stem, epoch=epoch, step=step, index=index, seed=prompt.seed
            ),
            rank=run.accelerator.process_index,
            world_size=run.accelerator.num_processes,
            together=run.sharding is not None,
        )
        self._trackers.images(of_all_processes(images), step)
        self._trainer.training_mode(run, True)


#: share of the time in which steps wait for data, from which on something is said to it
_LONG_WAIT = 0.1

#: names of the loop's metrics where the trackers' published keys differ
_TRACKER_NAMES = {"grad_norm": "norm/grad_norm"}
