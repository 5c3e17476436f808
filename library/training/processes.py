"""The processes of a run and what they compute in: accelerate's object, made from the options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.config.arguments import TrainingOptions
from library.data.latent_cache import Peers
from library.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def weight_dtype(options: TrainingOptions) -> torch.dtype:
    """What frozen weights are kept in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.mixed_precision, torch.float32)


def make_accelerator(
    options: TrainingOptions, *, backends: Sequence[str] = (), directory: Path | None = None
) -> Accelerator:
    """Join the processes that ``accelerate launch`` started.

    Args:
        backends: trackers, see ``library.training.logs``.
        directory: where the trackers write.

    Raises:
        UserError: a precision that this machine does not have.
    """
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    handlers: list[Any] = []
    if options.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout)))
    return Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=list(backends) or None,
        project_dir=None if directory is None else str(directory),
        kwargs_handlers=handlers,
        # one scheduler step per optimizer step, however many processes there are
        step_scheduler_with_optimizer=False,
    )


def peers_of(accelerator: Accelerator) -> Peers:
    """The run's processes, as caches share their work among them."""
    from accelerate.utils import gather_object

    return Peers(accelerator.process_index, accelerator.num_processes, gather_object)
