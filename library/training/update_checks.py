"""Check the updates of a run before anything is loaded."""

from __future__ import annotations

import torch

from library.config.arguments import RunOptions
from library.errors import UserError
from library.optim.fused_backward import check_fusible
from library.optim.optimizers import OptimizerChoice
from library.optim.trial import check_by_trial, check_change, is_schedule_free, updates_alone
from library.training.resume import TrainState, choice_of


def check_update(
    options: RunOptions,
    choice: OptimizerChoice,
    resumed: TrainState | None,
    device: torch.device,
    *,
    fused_flag: str | None,
) -> list[str]:
    """Try the optimizer on small tensors, with the run's options; returns warnings.

    Args:
        fused_flag: the option that asks for updates within the backward pass, if any.

    Raises:
        UserError: it cannot be used in this way, or cannot resume from the state.
    """
    output, resume = options.output, options.resume
    keeps_states = bool(output.save_state or output.save_state_on_train_end or resume.resume)
    found = check_by_trial(choice, device, keeps_states=keeps_states)
    if fused_flag is not None:
        check_fusible(choice.name, updates_alone(choice, device), fused_flag)
    if options.optimizer.ema_decay is not None and is_schedule_free(choice):
        raise UserError(f"--ema_decay: {choice.name} averages the weights by itself; remove one of them")
    if resumed is not None and resumed.fingerprint.get("optimizer") not in (None, choice.metadata_name):
        before = choice_of(resumed, choice)
        if before is None:
            raise UserError(
                f"--resume: the state was saved with the optimizer {resumed.fingerprint['optimizer']}, whose arguments "
                "cannot be read; give the --optimizer_args of that run"
            )
        check_change(before, choice, device)
    return found
