"""The training loop: batches to optimizer steps. It knows nothing of models; a trainer gives it a loss and hooks.

Per batch: seed dropout, loss, backward. Per step: update, which ``library.optim.update`` does alone.
Metrics are read one step late (``library.training.metrics``), so no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from library.config.core.training import OnNan
from library.data.dataset import Batch
from library.data.run_plan import RunPlan
from library.interrupt import Interrupt
from library.optim.update import Metrics, Update
from library.randomness import key
from library.training.metrics import DeferredMetrics, StepMetrics, StepTimes
from library.training.nonfinite import BadStep, StepGuard

if TYPE_CHECKING:
    from accelerate import Accelerator


class LoopHooks(Protocol):
    """Hooks between steps; steps and epochs are counted from 1."""

    def batches(self, epoch: int, start_batch: int) -> Iterable[Batch]:
        """Return the rest of an epoch (counted from 0 here), from one of its batches on."""
        ...

    def loss(self, batch: Batch) -> Tensor: ...

    def epoch_started(self, epoch: int) -> None: ...

    def batch_started(self, batch: Batch, step: int) -> None:
        """Called before a forward pass; ``step`` steps are done."""
        ...

    def step_ended(self, step: int, epoch: int) -> Metrics:
        """Called after the update of the weights, which it may limit; may return further metrics."""
        ...

    def metrics_ready(self, metrics: StepMetrics) -> None: ...

    def step_failed(self, bad: BadStep, *, ends_run: bool, back_to: int | None) -> None:
        """Called instead of ``metrics_ready`` for a step that is not finite; all processes take part.

        Args:
            back_to: the step whose snapshot was restored.

        Raises:
            NonFiniteLoss: if it ends the run.
        """
        ...

    def save_after_step(self, step: int, epoch: int) -> None: ...

    def save_after_epoch(self, step: int, epoch: int) -> None: ...

    def is_save_due(self, step: int) -> bool:
        """Whether anything will be saved after this step or its epoch, which is then checked to be finite first."""
        ...

    def is_over(self) -> bool:
        """Called after the saves of a step: whether the run ends here, before its last step."""
        ...

    def interrupted(self, step: int, epoch: int) -> None: ...


def run_loop(
    plan: RunPlan,
    *,
    start_step: int,
    seed: int,
    accelerator: Accelerator,
    update: Update,
    hooks: LoopHooks,
    interrupt: Interrupt,
    on_nan: OnNan = "stop",
    keeps_copies: bool = True,
) -> int:
    """Train from ``start_step`` to ``plan.total_steps``; return the number of steps done.

    Args:
        keeps_copies: whether the device has memory for copies of the trained weights, see ``StepGuard``.

    Raises:
        NonFiniteLoss: a value is not finite and ``on_nan`` ends the run; found before the next save.
    """
    times = StepTimes()
    guard = StepGuard(update, accelerator, on_nan, keeps_copies=keeps_copies)
    results = _Results(guard, hooks, rolls_back=on_nan == "rollback")
    several = accelerator.num_processes > 1

    step = start_step
    while step < plan.total_steps:
        position = plan.position(step)
        epoch = position.epoch + 1
        hooks.epoch_started(epoch)
        batches = iter(_ahead(hooks.batches(position.epoch, position.batch_in_epoch), accelerator.device))
        batch_in_epoch = position.batch_in_epoch
        while batch_in_epoch < plan.batches_per_epoch and step < plan.total_steps:
            count = plan.batches_of_step(batch_in_epoch)
            guard.start(step + 1)
            update.start_step(count)
            losses = []
            for index in range(count):
                batch = times.waiting(batches)
                hooks.batch_started(batch, step)
                # dropout uses torch's global generators: seeded by the step, not by history
                torch.manual_seed(key(seed, "batch", step, index, accelerator.process_index))
                loss = hooks.loss(batch)
                update.backward(loss)
                losses.append(loss.detach())
                guard.saw(batch, losses[-1])
            batch_in_epoch += count

            packed = _across_processes(accelerator, sum(losses[1:], losses[0]) / count, interrupt)
            guard.saw_step(packed["loss"])
            packed |= update.step(guard)
            step += 1

            packed |= hooks.step_ended(step, epoch)
            update.end_step(step)
            guard.step_ended(step)
            results.push(step, packed, measured=times.end_step())
            stops = results.stop_asked or (interrupt.requested and not several)
            saves = hooks.is_save_due(step) or stops or step == plan.total_steps
            results.collect(keep=0 if saves or batch_in_epoch >= plan.batches_per_epoch else 1)
            if saves:
                results.check(step)
            hooks.save_after_step(step, epoch)
            if batch_in_epoch >= plan.batches_per_epoch:
                hooks.save_after_epoch(step, epoch)
            if hooks.is_over():
                return step
            if not several and not stops and interrupt.requested:  # while sample images were generated
                stops = True
                results.collect(keep=0)
                results.check(step)
            if stops and step < plan.total_steps:
                with interrupt.finishing():
                    hooks.interrupted(step, epoch)
                return step
    results.collect(keep=0)
    return step


class _Results:
    """The metrics of steps, which are read late, and what follows if they are not finite."""

    def __init__(self, guard: StepGuard, hooks: LoopHooks, *, rolls_back: bool) -> None:
        self._guard = guard
        self._hooks = hooks
        self._rolls_back = rolls_back
        self._metrics = DeferredMetrics()
        self.stop_asked = False  # by any process

    def push(self, step: int, metrics: Metrics, *, measured: Mapping[str, float]) -> None:
        self._metrics.push(step, metrics, measured=measured)

    def collect(self, keep: int) -> None:
        """Read the metrics of all steps but the last ``keep``."""
        for ready in self._metrics.pop(keep=keep):
            self.stop_asked = self.stop_asked or ready.values.pop("interrupt", 0.0) > 0
            if (bad := self._guard.judge(ready)) is None:
                self._hooks.metrics_ready(ready)
            else:
                self._failed(bad)

    def check(self, step: int) -> None:
        """Check the weights before they are saved."""
        if (bad := self._guard.check(step)) is not None:
            self._failed(bad)

    def _failed(self, bad: BadStep) -> None:
        ends_run = self._guard.ends_run(bad)
        back_to = self._guard.roll_back() if self._rolls_back and not ends_run else None
        self._hooks.step_failed(bad, ends_run=ends_run, back_to=back_to)


def _across_processes(accelerator: Accelerator, loss: Tensor, interrupt: Interrupt) -> Metrics:
    """Return the mean loss of all processes and, of several, whether any was asked to stop."""
    if accelerator.num_processes == 1:
        return {"loss": loss}
    stop = torch.tensor(1.0 if interrupt.requested else 0.0, device=accelerator.device)
    packed = torch.stack([loss.float(), stop])
    return dict(zip(("loss", "interrupt"), accelerator.reduce(packed, reduction="mean").unbind(), strict=True))


def _ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to the device one batch before it is needed."""
    moved = None
    for batch in batches:
        waiting, moved = moved, batch.to(device, non_blocking=True)
        if waiting is not None:
            yield waiting
    if moved is not None:
        yield moved
