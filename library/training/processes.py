"""The processes of a run: accelerate's object, made from the options, and what all must agree on."""

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
from library.memory.host_heap import keep_freed_memory
from library.training.launch import check_launch, without_their_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

MAX_RANDOM_SEED = 2**31 - 1


def weight_dtype(options: TrainingOptions) -> torch.dtype:
    """What frozen weights are kept in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.mixed_precision, torch.float32)


def make_accelerator(
    options: TrainingOptions, *, backends: Sequence[str] = (), directory: Path | None = None
) -> Accelerator:
    """Join the processes that ``accelerate launch`` started, and prepare this one for the device it has.

    Args:
        backends: trackers, see ``library.training.logs``.
        directory: where the trackers write.

    Raises:
        UserError: a precision that this machine does not have; see ``check_launch`` too.
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
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


@contextlib.contextmanager
def _naming_failed_joins() -> Iterator[None]:
    """Errors of processes that cannot be joined are one line; ``LOCAL_RANK`` alone makes accelerate try."""
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
    """Refuse to run beside processes that were meant to share the work, and would write the same files.

    Args:
        started: processes, as their launcher says (``WORLD_SIZE``).
        joined: those of the process group.

    Raises:
        UserError: they differ.
    """
    if started != joined:
        raise UserError(
            f"{started} processes were started (WORLD_SIZE={started}), and this one knows of {joined}: each would train "
            "the whole run and write the same files. On a CPU use accelerate launch --cpu --num_processes "
            f"{started}, or set ACCELERATE_USE_CPU=true for torchrun; on GPUs, torch must find them (see "
            "docs/multi_gpu.md)"
        )


@contextlib.contextmanager
def finalizing(accelerator: Accelerator) -> Iterator[None]:
    """The processes part at the end, or where all of them stop, before any of them is gone.

    Without it the first that ends may take another with it, which still holds its connection. After an error of one
    process nothing is waited for.
    """
    try:
        yield
    except SystemExit:
        accelerator.end_training()
        raise
    accelerator.end_training()


def choose_seed(given: int | None, resumed: int | None = None) -> int:
    """The seed of a run: what the user says; what the resumed run's first part drew; or a number drawn now."""
    found = given if given is not None else resumed
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED) if found is None else found


def on_main_process(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do something on the main process alone; what it refuses is refused on all.

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
    """The main process's value on all of them, such as of a seed that each has drawn for itself."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def peers_of(accelerator: Accelerator) -> Peers:
    """The run's processes, as caches share their work among them."""
    from accelerate.utils import gather_object

    return Peers(accelerator.process_index, accelerator.num_processes, gather_object)
