"""The loop's hooks for one run: metrics to trackers, saves and their retention, sample images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.config.arguments import for_others
from library.data.dataset import Batch
from library.optim.update import Metrics
from library.training.bad_steps import BadStepReport
from library.training.loaded import LoadedRun
from library.training.logs import Progress, Trackers, print_summary
from library.training.metrics import DataWait, LossAverage, StepMetrics
from library.training.nonfinite import BadStep
from library.training.previews import PreviewPolicy, generate_previews, of_all_processes, preview_path
from library.training.processes import of_main_process

logger = logging.getLogger(__name__)


@dataclass
class _LastSave:
    """The steps after which weights and a state were last saved, and the path of the state."""

    weights: int | None = None
    state: int | None = None
    state_path: Path | None = None


class RunHooks:
    """Implements ``library.training.loop.LoopHooks``; steps and epochs count from 1."""

    def __init__(
        self,
        loaded: LoadedRun,
        summary: Sequence[tuple[str, str]],
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        run = loaded.run
        # a sharded model needs every process until the end of an image
        self._check = check_interrupt if run.sharding is None else lambda: None
        self._loaded = loaded
        self._run = run
        self._saver = loaded.saver
        self._summary = summary
        self._average = LossAverage(run.plan.steps_per_epoch)
        self._previews = PreviewPolicy(
            every_n_steps=run.options.sample.steps_between,
            every_n_epochs=run.options.sample.epochs_between,
            at_first=run.options.sample.sample_at_first,
            prompts=run.checked.prompts,
        )
        self._data_wait = DataWait()
        self._rates: dict[int, dict[str, float]] = {}
        self._progress: Progress | None = None
        self._trackers: Trackers | None = None
        self._bad_steps = BadStepReport(run.accelerator, run.options, run.plan, run.names, seed=run.checked.seed)
        self._last_save = _LastSave()

    @property
    def trackers(self) -> Trackers:
        """Return the trackers, which ``prepare`` starts."""
        assert self._trackers is not None
        return self._trackers

    # ---- the ends of a run ----

    def prepare(self) -> None:
        """Start the trackers, and generate the first sample images; an interrupt until here ends the run at once."""
        run = self._run
        if run.checked.resumed is not None:
            self._average.restore(run.checked.resumed.losses)
        config = for_others(run.options) if run.options.logging.log_config else {}
        self._trackers = Trackers(run.accelerator, run.checked.trackers, config)
        if run.accelerator.is_main_process:
            print_summary(self._summary, simple=run.options.console.console_log_simple)
        self._saver.set_training(True)
        if run.checked.resumed is None and self._previews.due_at_start():
            self._generate_previews(step=run.start_step, epoch=None)

    def start(self) -> None:
        """Announce the first step; an interrupt from here on is answered after a step, with all that was done saved."""
        run = self._run
        main = run.accelerator.is_main_process
        if main and run.start_step < run.plan.total_steps:
            logger.info("first step: %d of %d", run.start_step + 1, run.plan.total_steps)
        simple = run.options.console.console_log_simple
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

    # ---- hooks ----

    def batches(self, epoch: int, start_batch: int) -> Iterable[Batch]:
        """Return the rest of an epoch, counted from 0, tokenized in the loader's workers."""
        return self._run.data.dataloader(
            epoch=epoch,
            start_batch=start_batch,
            rank=self._run.accelerator.process_index,
            world_size=self._run.accelerator.num_processes,
            plan=self._run.plan,
            **self._loaded.loading,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        return self._loaded.losses(batch).mean()

    def epoch_started(self, epoch: int) -> None:
        self._loaded.kind.begin_epoch(epoch)

    def batch_started(self, batch: Batch, step: int) -> None:
        self._loaded.kind.begin_batch(batch, step)

    def step_ended(self, step: int, epoch: int) -> Metrics:
        self._rates[step] = self._loaded.update.learning_rates()
        return self._loaded.kind.after_step(step, self._run.device)

    def metrics_ready(self, metrics: StepMetrics) -> None:
        self._data_wait.add(metrics.values)
        loss = metrics.values["loss"]
        self._average.add(loss)
        entries = {"loss/current": loss, "loss/average": self._average.mean}
        entries |= {_TRACKER_NAMES.get(n, n): v for n, v in metrics.values.items() if n != "loss"}
        # learning rates are read at the step, metrics one step later
        self.trackers.log(entries | self._rates.pop(metrics.step), step=metrics.step)
        position = self._run.plan.position(metrics.step - 1)
        if self._progress is not None:
            self._progress.update(metrics.step, epoch=position.epoch + 1, loss=self._average.mean)

    def step_failed(self, bad: BadStep, *, ends_run: bool, back_to: int | None) -> None:
        self._rates.pop(bad.step, None)
        self._bad_steps(bad, ends_run=ends_run, back_to=back_to)

    def is_save_due(self, step: int) -> bool:
        validation, plan = self._loaded.validation, self._run.plan
        after = plan.position(step)
        ends_epoch = after.step_in_epoch == 0 and self._run.policy.saves_after_epoch(after.epoch, plan.num_epochs)
        by_step = self._run.policy.saves_after_step(step) or ends_epoch
        return by_step or (validation is not None and validation.is_due(step))

    def is_over(self) -> bool:
        return self._loaded.validation is not None and self._loaded.validation.ends_run

    def save_after_step(self, step: int, epoch: int) -> None:
        run, policy = self._run, self._run.policy
        # first, so that a save at this step includes it
        if (validation := self._loaded.validation) is not None:
            validation.after_step(step, epoch, training_loss=self._average.mean, trackers=self.trackers)
        if policy.saves_after_step(step):
            self._save_weights(run.names.step(step), step, epoch)
            if policy.save_state:
                self._save_state(run.names.step_state(step), step, epoch)
            if run.accelerator.is_main_process:
                if (old := policy.step_to_remove(step)) is not None:
                    self._saver.remove(run.names.step(old))
                if policy.save_state and (old := policy.step_state_to_remove(step)) is not None:
                    self._saver.remove(run.names.step_state(old))
        if self._previews.due_after_step(step):
            self._generate_previews(step=step, epoch=None)

    def save_after_epoch(self, step: int, epoch: int) -> None:
        run, policy = self._run, self._run.policy
        self.trackers.log_by_epoch({"loss/epoch_average": self._average.mean}, step=step, epoch=epoch)
        if policy.saves_after_epoch(epoch, run.plan.num_epochs):
            self._save_weights(run.names.epoch(epoch), step, epoch)
            if policy.save_state:
                self._save_state(run.names.epoch_state(epoch), step, epoch)
            if run.accelerator.is_main_process:
                if (old := policy.epoch_to_remove(epoch)) is not None:
                    self._saver.remove(run.names.epoch(old))
                if policy.save_state and (old := policy.epoch_state_to_remove(epoch)) is not None:
                    self._saver.remove(run.names.epoch_state(old))
        if self._previews.due_after_epoch(epoch):
            self._generate_previews(step=step, epoch=epoch)

    def interrupted(self, step: int, epoch: int) -> None:
        """Save weights and state so that nothing is lost, unless this step has been saved, and log how to resume."""
        run, last = self._run, self._last_save
        if last.weights != step:
            self._save_weights(run.names.step(step), step, epoch)
        if last.state != step:
            self._save_state(run.names.step_state(step), step, epoch)
        if run.accelerator.is_main_process:
            logger.warning("stopped after step %d; resume with: --resume %s", step, last.state_path)

    def _save_weights(self, path: Path, step: int, epoch: int) -> None:
        self._saver.save_weights(path, step=step, epoch=epoch)
        self._last_save.weights = step

    def _save_state(self, path: Path, step: int, epoch: int) -> None:
        losses, best = self._average.state(), self._loaded.best
        self._saver.save_state(path, step=step, epoch=epoch, losses=losses, validation=best)
        self._last_save.state, self._last_save.state_path = step, path

    # ---- previews ----

    def _generate_previews(self, *, step: int, epoch: int | None) -> None:
        run = self._run
        self._saver.set_training(False)
        images = generate_previews(
            of_main_process(self._loaded.prompts.current() if run.accelerator.is_main_process else ()),
            generate=lambda prompts, paths: self._loaded.previews(prompts, paths, self._check),
            path_of=lambda index, prompt: preview_path(
                run.names.directory, run.names.stem, epoch=epoch, step=step, index=index, seed=prompt.seed
            ),
            rank=run.accelerator.process_index,
            world_size=run.accelerator.num_processes,
            on_all_processes=run.sharding is not None,
            batch_size=self._loaded.previews.batch_size,
        )
        self.trackers.images(of_all_processes(images), step)
        self._saver.set_training(True)


#: fraction of the time spent waiting for data, above which advice is logged
_LONG_WAIT = 0.1

#: names of the loop's metrics where the trackers' published keys differ
_TRACKER_NAMES = {"grad_norm": "norm/grad_norm"}
