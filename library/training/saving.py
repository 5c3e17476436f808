"""Write a run's saves: weights, their averages, and states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.config.arguments import OutputOptions
from library.files.atomic import make_folder
from library.files.gathering import shards_of, write_together
from library.files.hub import Uploads
from library.optim.update import Update
from library.training.checkpoints import ema_path, remove_outdated
from library.training.kinds.base import Kind
from library.training.metadata import RunRecord
from library.training.resume import TrainState, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def save_dtype(options: OutputOptions) -> torch.dtype | None:
    """Return the dtype of ``--save_precision``; ``None``: each tensor's own."""
    known = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return known.get(options.save_precision or "")


class Saver:
    """Writes the files of one run; all processes call it, the main one writes.

    Args:
        record: of the metadata.
        files_beside: a file of weights -> the files that belong to it.
        run_state: returns a state's record with what is the same in all states of the run; called when one is saved.
        written: names of this run's files, which alone retention may remove; ``None`` if a resumed state does not
            record them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        kind: Kind,
        update: Update,
        record: RunRecord,
        options: OutputOptions,
        *,
        uploads: Uploads,
        files_beside: Callable[[Path], Sequence[Path]],
        run_state: Callable[[], TrainState],
        written: set[str] | None,
    ) -> None:
        self._accelerator = accelerator
        self._kind = kind
        self._update = update
        self._record = record
        self._options = options
        self._uploads = uploads
        self._files_beside = files_beside
        self._run_state = run_state
        self._written = written

    def set_training(self, training: bool) -> None:
        """Switch trained modules and schedule-free optimizers between training, and sampling or saving."""
        self._kind.set_training(training)
        self._update.training_mode(training)

    def save_weights(self, path: Path, *, step: int, epoch: int) -> None:
        """Write the weights, and their averages beside them."""
        self.set_training(False)
        self._update.settle()
        self._write(path, step, epoch)
        if self._accelerator.is_main_process:
            self._wrote(path)
            logger.info("saved weights: %s", path)
            for written in (path, ema_path(path)) if self._update.average is not None else (path,):
                for file in (*self._files_beside(written), written):
                    self._uploads.add(file)
        self.set_training(True)

    def _write(self, path: Path, step: int, epoch: int) -> None:
        """Write both files; the main process does, and the others give their parts of what is sharded."""
        shards = shards_of(self._kind.modules())
        if not (shards or self._accelerator.is_main_process):
            return
        metadata = self._record.at_save(step=step, epoch=epoch)

        def save(to: Path, added: Mapping[str, str]) -> None:
            def work() -> None:
                make_folder(to.parent)
                self._kind.save(to, save_dtype(self._options), {**metadata, **added}, step=step, epoch=epoch)

            if shards:
                write_together(work, shards, self._accelerator.device)
            else:
                work()

        save(path, {})
        average = self._update.average
        if average is not None:
            with average.applied():
                save(ema_path(path), {} if self._options.no_metadata else {"ss_ema_decay": str(average.decay)})

    def save_state(
        self, path: Path, *, step: int, epoch: int, losses: list[float], validation: Mapping[str, float]
    ) -> None:
        """Write a state folder.

        Args:
            losses: the window of the running average.
            validation: the best one so far.
        """
        self._wrote(path)
        state = replace(
            self._run_state(),
            current_epoch=epoch,
            current_step=step,
            losses=losses,
            validation=dict(validation),
            written=None if self._written is None else sorted(self._written),
        )
        self._update.settle()
        # in training mode: schedule-free optimizers resume from their training weights
        save_state(self._accelerator, path, state, self._update.write_states)
        if self._options.save_state_to_huggingface:
            self._uploads.add(path)

    def _wrote(self, path: Path) -> None:
        if self._written is not None:
            self._written.add(path.name)

    def remove(self, path: Path) -> None:
        """Remove outdated weights or a state. Files that are still being uploaded are removed afterwards."""
        if self._written is not None:
            if path.name not in self._written:
                if path.exists():
                    logger.info("%s: kept, as another run wrote it", path)
                return
            self._written.discard(path.name)
        uploads = self._uploads
        for file in (*self._files_beside(path), *self._files_beside(ema_path(path))):
            uploads.when_free(file, remove_outdated)
        # averages are removed with their weights, so both must be uploaded
        uploads.when_free(ema_path(path), lambda _: uploads.when_free(path, remove_outdated))
