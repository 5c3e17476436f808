"""Find intervals of steps and epochs that are longer than the run."""

from __future__ import annotations

from library.config.arguments import RunOptions
from library.config.declaration import message
from library.config.no_effect import given
from library.data.run_plan import RunPlan
from library.errors import NoEffect

#: options that count optimizer steps, completed epochs, and epochs before the last
STEPS = ("save_every_n_steps", "sample_every_n_steps")
EPOCHS = ("sample_every_n_epochs",)
EPOCHS_BEFORE_THE_LAST = ("save_every_n_epochs",)


def without_effect_in_plan(options: RunOptions, plan: RunPlan) -> list[NoEffect]:
    """Return one warning for each interval that never ends."""
    steps = f"in a run of {plan.total_steps} steps"
    epochs = f"in a run of {plan.num_epochs} epochs"
    last = f"{epochs}: the last epoch's weights are the final file"
    limits = [
        *((name, plan.total_steps, steps) for name in STEPS),
        *((name, plan.num_epochs, epochs) for name in EPOCHS),
        *((name, plan.num_epochs - 1, last) for name in EPOCHS_BEFORE_THE_LAST),
    ]
    values = {**vars(options.output), **vars(options.sample)}
    said = given(options)
    found = [
        NoEffect(message([name], reason))
        for name, most, reason in limits
        if name in said and (values[name] or 0) > most
    ]
    if options.output.save_n_epoch_ratio is not None and plan.num_epochs < 2:
        found.append(NoEffect(message(["save_n_epoch_ratio"], last)))
    first = options.resume.initial_step
    if options.resume.skip_until_initial_step and first and first % plan.steps_per_epoch == 0:
        reason = f"as step {first} is where an epoch's data begin anyway"
        found.append(NoEffect(message(["skip_until_initial_step"], reason)))
    return found
