"""The processes of a run: accelerate's object, made from the options, and what all processes must agree on."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from library.config.arguments import TrainingOptions
from library.data.latent_cache import Peers
from library.errors import UserError
from library.launched import process_count
from library.training.launch import check_launch, without_their_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

MAX_RANDOM_SEED = 2**31 - 1


def weight_dtype(options: TrainingOptions) -> torch.dtype:
    """Return the dtype of frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.mixed_precision, torch.float32)


def make_accelerator(
    options: TrainingOptions, *, backends: Sequence[str] = (), directory: Path | None = None
) -> Accelerator:
    """Join the processes that ``accelerate launch`` started, and prepare this one for its device.

    Args:
        backends: trackers, see ``library.training.logs``.
        directory: folder of the trackers.

    Raises:
        UserError: a precision that this machine does not support; see also ``check_launch``.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin

    check_launch(options)
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    handlers: list[Any] = []
    if options.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout)))
    with without_their_sharding(), _naming_failed_joins():
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            log_with=list(backends) or None,
            project_dir=None if directory is None else str(directory),
            kwargs_handlers=handlers,
            # the loop accumulates by itself; without this, accelerate's environment could scale the loss
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # one scheduler step per optimizer step, however many processes there are
            step_scheduler_with_optimizer=False,
        )
    check_joined(process_count(), accelerator.num_processes)
    if options.full_fp16:
        from library.optim.stochastic_rounding import HalfGradScaler

        accelerator.scaler = HalfGradScaler(accelerator.device.type)
    return accelerator


@contextlib.contextmanager
def _naming_failed_joins() -> Iterator[None]:
    """Turn errors of processes that cannot join into one line; ``LOCAL_RANK`` alone makes accelerate try."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if "LOCAL_RANK" not in os.environ and process_count() == 1:
            raise
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this run cannot join ({what}); start them with accelerate launch or torchrun, or unset "
            "RANK, LOCAL_RANK and WORLD_SIZE for one process"
        ) from None


def check_joined(started: int, joined: int) -> None:
    """Refuse to run beside processes that should share the work but would write the same files.

    Args:
        started: processes started by the launcher (``WORLD_SIZE``).
        joined: processes in the process group.

    Raises:
        UserError: they differ.
    """
    if started != joined:
        raise UserError(
            f"{started} processes were started (WORLD_SIZE={started}), and this one knows of {joined}: each would "
            "train the whole run and write the same files. On a CPU set ACCELERATE_USE_CPU=true, and start "
            f"torchrun --nproc_per_node {started}; on GPUs, torch must find them (see "
            "docs/multi_gpu.md)"
        )


@contextlib.contextmanager
def finalizing(accelerator: Accelerator) -> Iterator[None]:
    """A barrier at the end, or where all processes stop, before any of them exits.

    Without it, the first process that exits may crash another one that still holds its connection. After an error of
    one process there is no wait.
    """
    try:
        yield
    except SystemExit:
        accelerator.end_training()
        raise
    accelerator.end_training()


def choose_seed(given: int | None, resumed: int | None = None) -> int:
    """Return the seed of a run: the user's, that of the resumed state, or a random one."""
    found = given if given is not None else resumed
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED) if found is None else found


def on_main_process(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Call a function on the main process only; its error is raised on all.

    Raises:
        UserError: the main process's.
    """
    problem = ""
    if accelerator.is_main_process:
        try:
            work()
        except UserError as error:
            problem = str(error)
    if problem := of_main_process(problem):
        raise UserError(problem)


def of_main_process(value: T) -> T:
    """Return the main process's value on all processes, such as a random seed."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def peers_of(accelerator: Accelerator) -> Peers:
    """Return the run's processes as peers that fill caches together."""
    from accelerate.utils import gather_object

    return Peers(accelerator.process_index, accelerator.num_processes, gather_object)
