"""Plan the files that the saves of a run will write, and those that retention will remove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.data.run_plan import RunPlan
from library.training.checkpoints import OutputNames, SavePolicy


@dataclass(frozen=True)
class PlannedFile:
    """Weights or a state folder that the run will write."""

    path: Path
    step: int  # the step after which it is written, counted from 1
    removed_after: int | None = None  # the step at whose save retention removes it
    is_state: bool = False


def planned_files(plan: RunPlan, policy: SavePolicy, names: OutputNames, *, after_step: int = 0) -> list[PlannedFile]:
    """Return what the saves of a run write after ``after_step``, in order, and what retention removes."""
    written: dict[Path, int] = {}
    states: set[Path] = set()
    removed: dict[Path, int] = {}
    for step, epoch in _save_moments(plan, policy):
        if step <= after_step:
            continue
        outdated: tuple[Callable[[int], Path], ...]
        if epoch is None:
            weights, state = names.step(step), names.step_state(step)
            old = policy.step_to_remove(step), policy.step_state_to_remove(step)
            outdated = names.step, names.step_state
        else:
            weights, state = names.epoch(epoch), names.epoch_state(epoch)
            old = policy.epoch_to_remove(epoch), policy.epoch_state_to_remove(epoch)
            outdated = names.epoch, names.epoch_state
        written[weights] = step
        if policy.save_state:
            written[state] = step
            states.add(state)
        for number, name in zip(old, outdated, strict=True):
            if number is not None and name(number) in written:
                removed.setdefault(name(number), step)
    written[names.final()] = plan.total_steps
    if policy.save_state or policy.save_state_on_train_end:
        written[names.final_state()] = plan.total_steps
        states.add(names.final_state())
    return [PlannedFile(path, step, removed.get(path), path in states) for path, step in written.items()]


def _save_moments(plan: RunPlan, policy: SavePolicy) -> list[tuple[int, int | None]]:
    """Yield (step, epoch or ``None`` for a save by steps), both from 1, in the order of the run."""
    moments: list[tuple[int, int | None]] = []
    if policy.every_n_steps:
        moments += [(step, None) for step in range(policy.every_n_steps, plan.total_steps + 1, policy.every_n_steps)]
    if policy.every_n_epochs:
        for epoch in range(policy.every_n_epochs, plan.num_epochs, policy.every_n_epochs):
            if policy.saves_after_epoch(epoch, plan.num_epochs):
                moments.append((plan.steps_until(epoch), epoch))
    return sorted(moments, key=lambda moment: (moment[0], moment[1] is not None))
