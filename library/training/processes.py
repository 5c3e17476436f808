"""The processes of a run: the accelerator, and what all must agree on."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from library.config.arguments import TrainingOptions
from library.errors import UserError
from library.training.logs import TrackerSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


MAX_RANDOM_SEED = 2**31 - 1


def make_accelerator(training: TrainingOptions, trackers: TrackerSettings) -> Accelerator:
    """Join the other processes, if there are any.

    Raises:
        UserError: a precision that the device does not have.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    handlers: list[Any] = []
    if training.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=training.ddp_timeout)))
    return Accelerator(
        mixed_precision=training.mixed_precision,
        log_with=list(trackers.backends),
        project_dir=str(trackers.directory),
        kwargs_handlers=handlers,
        # one scheduler step per optimizer step, however many processes there are
        step_scheduler_with_optimizer=False,
    )


def choose_seed(given: int | None, resumed: int | None) -> int:
    """The seed of a run: what the user says; what the resumed run's first part drew; or a number drawn now."""
    found = given if given is not None else resumed
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED) if found is None else found


def of_main_process(value: int) -> int:
    """The main process's value on all of them, of a seed that each has drawn for itself."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]
