"""The output folder of a run: try every path that it will write before training, and lock its name.

Nothing of others is removed, except files that the run replaces, which a warning names at the start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from library.errors import UserError
from library.files.atomic import clear, disk_reason, make_folder, recover_directory, write_bytes
from library.files.lock import Held, lock_path, locked
from library.training.checkpoints import OutputNames, ema_path, is_folder_of_weights, is_model, is_state
from library.training.planned_files import PlannedFile, planned_files
from library.training.processes import on_main_process
from library.training.resume import TrainState
from library.training.run import Run

logger = logging.getLogger(__name__)

#: bytes written to test a folder: more than file systems store inside the directory entry
_TRIED = 1 << 16
#: temporary files of the safetensors package, which remain after a kill
_OTHERS_LEFT = re.compile(r"\.tmp[A-Za-z0-9]{6}|\.{1,2}writable-\d+(\.tmp)?")
#: seconds after which such a file is abandoned
_OLD = 600
#: files named in a message at most
_SHOWN = 3


def refuse_bad_targets(
    files: Sequence[PlannedFile],
    *,
    averaged: bool,
    folders: Iterable[Path],
    tried: bool,
    beside: Callable[[Path], Sequence[Path]] = lambda path: (),
) -> None:
    """Check before the work whether everything that a run will write can be written.

    Args:
        beside: gives the files that belong to a file of weights.
        averaged: whether moving averages are written beside weights.
        folders: folders that are written to, such as ``sample``.
        tried: create the folders and write to them; otherwise, as in a dry run, only look.

    Raises:
        UserError: one line for each file that cannot be written, or the first folder.
    """
    targets: list[Path] = []
    states = set()
    for file in files:
        paths = [file.path, ema_path(file.path)] if averaged and not file.is_state else [file.path]
        if file.is_state:
            states.add(file.path)
        else:
            paths += [other for path in list(paths) for other in beside(path)]
        targets += paths
    problems = [p for path in _worth_a_look(targets) if (p := _problem_of(path, is_state=path in states))]
    if problems:
        more = len(problems) - _SHOWN
        raise UserError("\n".join(problems[:_SHOWN] + ([f"and {more} more of the kind"] if more > 0 else [])))
    for folder in dict.fromkeys(folders):
        _try_folder(folder, tried=tried)


def _worth_a_look(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the paths that exist and, of each folder, the longest, which stands for all that do not.

    A run may plan a hundred thousand files: their folders are listed, instead of looking for each of them.
    """
    by_folder: dict[str, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    for folder, inside in by_folder.items():
        longest = max(inside, key=lambda path: len(os.fsencode(path.name)))
        try:  # some file systems know no case
            taken = {name.casefold() for name in os.listdir(folder or ".")}
        except (FileNotFoundError, NotADirectoryError):
            taken = set()
        except OSError:  # it may be used, but not listed
            yield from inside
            continue
        yield from (path for path in inside if path is longest or path.name.casefold() in taken)


def _problem_of(path: Path, *, is_state: bool) -> str:
    """Return why a file or a state cannot be written there; empty if it can."""
    remedy = "move it, or give another --output_name or --output_dir"
    try:
        os.lstat(path)
    except FileNotFoundError:
        return _problem_of_names(path)
    except OSError as error:  # a name that is too long; a file among the folders above
        return f"{path}: cannot be written ({error.strerror}); give another --output_name or --output_dir"
    if not is_state and is_folder_of_weights(path):
        if not path.is_dir():
            return f"{path}: is a file, but the folder of a model must be written there; {remedy}"
        if not is_model(path) and any(path.iterdir()):
            return f"{path}: this folder holds no model of a run, and one would replace it; {remedy}"
        return ""
    if not is_state:
        return f"{path}: is a folder, but a file of weights must be written there; {remedy}" if path.is_dir() else ""
    if not path.is_dir():
        return f"{path}: is a file, but the folder of a state must be written there; {remedy}"
    if not is_state_or_empty(path):
        return f"{path}: this folder holds no state of training, and a state would replace it; {remedy}"
    return ""


def _problem_of_names(path: Path) -> str:
    """Return why a path in a folder that is still to be made is impossible; empty if it is not."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    for name in path.absolute().relative_to(above).parts:
        try:  # within a folder that is missing, the system calls no name too long
            os.lstat(above / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{path}: cannot be written ({error.strerror}); give another --output_name or --output_dir"
    return ""


def is_state_or_empty(folder: Path) -> bool:
    """Whether a state may replace a folder without losing anything else."""
    return is_state(folder) or not any(folder.iterdir())


def _try_folder(folder: Path, *, tried: bool) -> None:
    if tried:
        make_folder(folder)
        probe = folder / f".writable-{os.getpid()}"
        write_bytes(probe, bytes(_TRIED))
        with contextlib.suppress(OSError):
            probe.unlink()
        return
    above = folder.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise UserError(f"{folder}: cannot be made, as {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: may not be written (permission denied)")


def say_what_is_replaced(files: Sequence[PlannedFile], *, own: Collection[str]) -> None:
    """Warn of files of earlier runs that will be replaced.

    Args:
        own: names of files that the run wrote before it was resumed.
    """
    planned = _worth_a_look([file.path for file in files])
    found = [path.name for path in planned if path.exists() and path.name not in own]
    if found:
        some = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        logger.warning(
            "%s: this run will replace %s, which %s there; give another --output_name to keep %s",
            *(files[0].path.parent, some, *(("is", "it") if len(found) == 1 else ("are", "them"))),
        )


@contextlib.contextmanager
def claimed_output(run: Run) -> Iterator[None]:
    """Try all paths that a run will write, warn of what it replaces, and lock its output name within the context.

    Raises:
        UserError: on all processes, for errors of the main one; see ``refuse_bad_targets`` and ``only_run``.
    """
    with contextlib.ExitStack() as held:
        on_main_process(run.accelerator, lambda: _claim(run, held))
        yield


def _claim(run: Run, held: contextlib.ExitStack) -> None:
    check_output(run, tried=True)
    held.enter_context(only_run(run.names))
    planned = planned_files(run.plan, run.policy, run.names, after_step=run.start_step)
    say_what_is_replaced(planned, own=own_files(run.checked.resumed, run.checked.state_folder, run.names) or ())


def check_output(run: Run, *, tried: bool) -> None:
    """Call ``refuse_bad_targets`` for a run."""
    options, names, last = run.options, run.names, run.plan.total_steps
    files = planned_files(run.plan, run.policy, names, after_step=run.start_step)
    # an interrupted run saves at any step; the last step has the longest names
    files += [PlannedFile(names.step(last), last), PlannedFile(names.step_state(last), last, is_state=True)]
    if options.validation.save_best:
        files.append(PlannedFile(names.best(), last))
    folders = [names.directory, run.checked.trackers.directory]
    if run.checked.prompts:
        folders.append(names.directory / "sample")
    refuse_bad_targets(
        files,
        averaged=options.optimizer.ema_decay is not None,
        folders=folders,
        tried=tried,
        beside=partial(run.kind.files_beside, run.architecture, options),
    )


def own_files(resumed: TrainState | None, state_folder: Path | None, names: OutputNames) -> set[str] | None:
    """Return the names in the output folder that a run wrote before it was resumed; ``None`` if unknown."""
    if resumed is None or state_folder is None:
        return set()
    if state_folder.resolve().parent != names.directory.resolve():
        return set()
    return None if resumed.written is None else set(resumed.written)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to train without space for one save.

    Args:
        needed: bytes of the largest weights file, whose predecessor stays until it is complete.

    Raises:
        UserError: less space is free.
    """
    with contextlib.suppress(OSError):  # some network drives do not report it
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{folder}: {free / 1e6:.0f} MB are free, and one file of the trained weights takes {needed / 1e6:.0f} "
                "MB; make room, or give another --output_dir"
            )


@contextlib.contextmanager
def only_run(names: OutputNames) -> Iterator[None]:
    """Lock the output name in its folder while a run writes there, and clear leftovers of killed runs.

    Raises:
        UserError: another run writes files of this name.
    """
    name = names.stem or "last"
    make_folder(names.directory)
    held = contextlib.ExitStack()
    try:
        held.enter_context(locked(lock_path(names.directory, name)))
    except Held as error:
        raise UserError(
            f"{names.directory}: another run ({error.owner}) is writing {name!r} there; give another --output_name or "
            "--output_dir, or wait for it to end"
        ) from None
    except OSError as error:
        raise UserError(f"{names.directory}: {disk_reason(error, names.directory)}") from None
    with held:
        clear_leftovers(names)
        yield


def clear_leftovers(names: OutputNames) -> None:
    """Finish or remove what a killed run of this name was writing, and old temporary files of safetensors."""
    stem = re.escape(names.stem) if names.stem else "(last|at|epoch)"
    ours = re.compile(
        rf"\.(?P<target>{stem}(-\d{{6}}|-step\d{{8}})?(-best)?(-ema)?(-state|(_[\w-]+)?\.[a-z]+)?)"
        r"(\.old|\.removed|\.[0-9a-f]{12})?\.tmp"
    )
    for entry in sorted(names.directory.iterdir()):
        if found := ours.fullmatch(entry.name):
            if entry.is_dir():
                recover_directory(names.directory / found["target"])
            clear(entry)
        elif _OTHERS_LEFT.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _OLD:
                    entry.unlink()
