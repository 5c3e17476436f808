"""State folders: everything that a run needs to resume exactly where it stopped.

A folder holds what accelerate saves (adapter weights, optimizer, scheduler, scaler, random states of
every process) and ``train_state.json``. It is written beside its place and renamed into it with a
manifest, so a folder under its final name is whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.config.arguments import RunOptions, flat
from library.data.order import Order
from library.errors import UserError, known_ending
from library.files.atomic import MANIFEST_NAME, atomic_directory, verify_directory
from library.launched import is_first_process
from library.optim.optimizers import OptimizerChoice, recorded_choice
from library.training.checkpoints import STATE_FILE, is_state
from library.training.fingerprint import is_digest
from library.training.state_checks import problem_of_record, refuse_bad_optimizer, refuse_bad_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.getLogger(__name__)

#: accelerate's, in a state folder
_OPTIMIZER_FILE = "optimizer.bin"


@dataclass(frozen=True)
class TrainState:
    """The position of a run; the first two fields are the published ones."""

    current_epoch: int  # counted from 1
    current_step: int  # optimizer steps done
    seed: int | None = None
    #: properties that must be equal for an exact resumed run: name -> value
    fingerprint: dict[str, object] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    #: the best validation so far, as ``library.training.validation.BestSoFar`` writes it
    validation: dict[str, float] = field(default_factory=dict)
    #: start of the run's data, see ``library.data.run_plan.Origin``
    origin_step: int = 0
    origin_epoch: int = 0
    #: names of the files and states that the run wrote to the folder of this state; None if unknown
    written: list[str] | None = None

    @property
    def order(self) -> Order:
        """Return the order of images in which the run continues exactly."""
        is_older = bool(self.fingerprint) and "order of images" not in self.fingerprint
        return "by batch" if is_older else "by step"

    def changes(self, now: dict[str, object]) -> list[str]:
        """Return a line for every difference that breaks exactness."""
        return [
            f"{name} changed" if is_digest(before) else f"{name} was {before!r} and is now {now[name]!r}"
            for name, before in self.fingerprint.items()
            if name in now and now[name] != before
        ]


def read_state(folder: Path) -> TrainState:
    """Read and check a state folder's record before anything heavy is loaded.

    Raises:
        UserError: not a state folder, or torn.
    """
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder; give the '...-state' folder itself, not --output_dir")
    record = folder / STATE_FILE
    if not record.exists():
        inside = sorted(p.name for p in folder.glob("*-state") if p.is_dir())
        hint = f"; it holds {inside[-1]!r}: give that one" if inside else ""
        raise UserError(f"--resume {folder}: not a state folder ({STATE_FILE} is missing){hint}")
    has_manifest = (folder / MANIFEST_NAME).exists()
    if has_manifest:
        verify_directory(folder)
    state = _read_record(folder, record)
    if not has_manifest:
        if state.fingerprint:  # this program's states have both; those of others have neither
            raise UserError(
                f"--resume {folder}: {MANIFEST_NAME} is missing, so nobody knows whether the state is whole; copy the "
                "whole folder again, or use another state"
            )
        if is_first_process():
            logger.warning("--resume %s: written by another program, without a manifest: not checked", folder)
    return state


def _read_record(folder: Path, record: Path) -> TrainState:
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        known = {name: values[name] for name in TrainState.__dataclass_fields__ if name in values}
        state, problem = TrainState(**known), problem_of_record(known)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--resume {folder}: {STATE_FILE} cannot be read ({error}); use an older state") from None
    if problem:
        raise UserError(f"--resume {folder}: {STATE_FILE}: {problem}; use an older state")
    return state


def save_state(
    accelerator: Accelerator, folder: Path, state: TrainState, write_optimizer: Callable[[Path], None]
) -> None:
    """Write a state folder; every process takes part, and it gets its name when all are done.

    Args:
        write_optimizer: see ``Update.write_states``.
    """
    if accelerator.is_main_process:
        _keep_others(folder)
    with _shared_directory(accelerator, folder) as target:
        accelerator.save_state(str(target), safe_serialization=True)
        write_optimizer(target / _OPTIMIZER_FILE)
        if accelerator.is_main_process:
            (target / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
    if accelerator.is_main_process:
        logger.info("saved state: %s", folder)


def _keep_others(folder: Path) -> None:
    """Move a folder out of the way that appeared at a state's path since the start and is no state."""
    if is_state(folder) or not os.path.lexists(folder):
        return
    aside = next(p for n in itertools.count(1) if not os.path.lexists(p := folder.with_name(f"{folder.name}.{n}")))
    try:
        os.replace(folder, aside)
    except OSError as error:
        raise UserError(f"{folder}: this is no state of training, and cannot be moved ({error.strerror})") from None
    logger.warning("%s was no state of training: it is kept as %s", folder, aside)


@contextlib.contextmanager
def _shared_directory(accelerator: Accelerator, folder: Path) -> Iterator[Path]:
    """A temporary folder for all processes; the main one renames it when the last process has written."""
    if accelerator.num_processes == 1:
        with atomic_directory(folder) as target:
            yield target
        return
    from accelerate.utils import broadcast_object_list

    if accelerator.is_main_process:
        with atomic_directory(folder) as target:
            broadcast_object_list([str(target)])
            yield target
            accelerator.wait_for_everyone()
    else:
        shared: list[str | None] = [None]
        broadcast_object_list(shared)
        yield Path(str(shared[0]))
        accelerator.wait_for_everyone()


# ---- states of a run ----


def check_fits(
    state: TrainState,
    options: RunOptions,
    optimizer: OptimizerChoice,
    *,
    shaping: Sequence[str],
    starts_from: str,
) -> None:
    """Refuse options that do not fit the state's tensors; ``name_changes`` warns of the others.

    Args:
        shaping: options that decide which tensors a state holds.
        starts_from: the option that begins a new run with the weights of another.

    Raises:
        UserError: one line for each.
    """
    before, after = _class_of(state.fingerprint.get("optimizer")), _class_of(optimizer.metadata_name)
    pairs: list[tuple[str, object, object]] = [("the optimizer", before, after)]
    now = {field.name: value for field, value in flat(options)}
    pairs += [(f"--{n}", state.fingerprint.get(f"--{n}"), now[n]) for n in shaping]
    problems = [
        f"--resume {options.resume.resume}: it was saved with {name} {before}, not {after}; give what that run had, or "
        f"begin a new one with its weights ({starts_from})"
        for name, before, after in pairs
        # without a given rank, it is the module's, or the file's
        if before is not None and after is not None and before != after
    ]
    problems += _schedule_problems(state, options)
    if problems:
        raise UserError("\n".join(problems))


def _schedule_problems(state: TrainState, options: RunOptions) -> Iterator[str]:
    """Check a schedule of a custom class, which resumes from its own state, so that new arguments would be ignored."""
    for name, now in (("type", options.scheduler.lr_scheduler_type), ("args", options.scheduler.lr_scheduler_args)):
        before = state.fingerprint.get(f"--lr_scheduler_{name}", now)
        was_custom = bool(state.fingerprint.get("--lr_scheduler_type"))
        if (was_custom or options.scheduler.lr_scheduler_type) and (before or None) != (now or None):
            yield (
                f"--resume {options.resume.resume}: it was saved with --lr_scheduler_{name} {before or 'not given'}, "
                "not "
                f"{now or 'without it'}; a schedule of --lr_scheduler_type continues from its own state: give what "
                "that run had, or begin a new one with its weights (--network_weights)"
            )


def choice_of(state: TrainState, now: OptimizerChoice) -> OptimizerChoice | None:
    """Return the optimizer of a state; ``None`` if it is not recorded, or cannot be parsed."""
    record = state.fingerprint.get("optimizer")
    return recorded_choice(record, now) if isinstance(record, str) else None


def _class_of(optimizer: object) -> str | None:
    return optimizer.partition("(")[0] if isinstance(optimizer, str) else None


def name_changes(resumed: TrainState, fingerprint: dict[str, object]) -> None:
    """Warn of changes since the state was saved."""
    for change in resumed.changes(fingerprint):
        logger.warning("--resume: %s: the run continues, but not exactly as it would have", change)


#: errors of torch and accelerate for other names, shapes or numbers of tensors, and for edited files
_MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, OSError)


def load_state(accelerator: Accelerator, folder: Path, *, starts_from: str, sharded: bool = False) -> None:
    """Load weights, optimizer, scheduler and the random states of this process.

    Args:
        sharded: whether each process needs only parts of the tensors, for which files are mapped.

    Raises:
        UserError: the state's tensors do not fit this run or are not finite, or a file contains code.
    """
    refuse_bad_weights(folder)
    try:
        accelerator.load_state(str(folder), load_kwargs={"mmap": True} if sharded else None)
    except torch.cuda.OutOfMemoryError:
        raise
    except _MISFITS as error:
        if known_ending(error):
            raise
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"--resume {folder}: it was saved with another network or optimizer ({what}); give that run's options, "
            f"or begin a new one with its weights ({starts_from})"
        ) from error
    except pickle.UnpicklingError:  # accelerate reads tensors and plain values only
        raise UserError(
            f"--resume {folder}: a file of it holds more than tensors and numbers, which is not read, as it may run "
            "any code; use another state"
        ) from None
    for optimizer in accelerator._optimizers:
        refuse_bad_optimizer(folder, optimizer)
