"""Write a run's saves: weights, their averages, and states."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from library.config.arguments import OutputOptions
from library.files.atomic import make_folder
from library.files.gathering import shards_of, write_together
from library.optim.update import Update
from library.training.checkpoints import ema_path, remove_outdated
from library.training.kinds.base import Kind
from library.training.metadata import RunRecord
from library.training.outputs import own_files
from library.training.resume import TrainState, save_state
from library.training.run import Run

logger = logging.getLogger(__name__)


def save_dtype(options: OutputOptions) -> torch.dtype | None:
    """Return the dtype of ``--save_precision``; ``None``: each tensor's own."""
    known = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return known.get(options.save_precision or "")


class Saver:
    """Writes the files of one run; all processes call it, the main one writes."""

    def __init__(self, run: Run, kind: Kind, update: Update, record: RunRecord) -> None:
        self._run = run
        self._kind = kind
        self._update = update
        self._record = record
        #: names of this run's files, which alone retention may remove; ``None`` if a resumed state does not record them
        self._written = own_files(run.checked.resumed, run.checked.state_folder, run.names)

    def set_training(self, training: bool) -> None:
        """Switch trained modules and schedule-free optimizers between training, and sampling or saving."""
        self._kind.set_training(training)
        self._update.training_mode(training)

    def save_weights(self, path: Path, *, step: int, epoch: int) -> None:
        """Write the weights, and their averages beside them."""
        self.set_training(False)
        self._update.settle()
        self._write(path, step, epoch)
        if self._run.accelerator.is_main_process:
            self._wrote(path)
            logger.info("saved weights: %s", path)
            for written in (path, ema_path(path)) if self._update.average is not None else (path,):
                for file in (*self._beside(written), written):
                    self._run.uploads.add(file)
        self.set_training(True)

    def _beside(self, path: Path) -> Sequence[Path]:
        """Return the files that belong to a file of weights."""
        return self._run.kind.files_beside(self._run.architecture, self._run.options, path)

    def _write(self, path: Path, step: int, epoch: int) -> None:
        """Write both files; the main process does, and the others give their parts of what is sharded."""
        shards = shards_of(self._kind.modules())
        if not (shards or self._run.accelerator.is_main_process):
            return
        output = self._run.options.output
        metadata = self._record.at_save(step=step, epoch=epoch)

        def save(to: Path, added: Mapping[str, str]) -> None:
            def work() -> None:
                make_folder(to.parent)
                self._kind.save(to, save_dtype(output), {**metadata, **added}, step=step, epoch=epoch)

            if shards:
                write_together(work, shards, self._run.device)
            else:
                work()

        save(path, {})
        average = self._update.average
        if average is not None:
            with average.applied():
                save(ema_path(path), {} if output.no_metadata else {"ss_ema_decay": str(average.decay)})

    def save_state(
        self, path: Path, *, step: int, epoch: int, losses: list[float], validation: Mapping[str, float]
    ) -> None:
        """Write a state folder.

        Args:
            losses: the window of the running average.
            validation: the best one so far.
        """
        run = self._run
        self._wrote(path)
        state = TrainState(
            current_epoch=epoch,
            current_step=step,
            seed=run.checked.seed,
            fingerprint=run.fingerprint,
            losses=losses,
            validation=dict(validation),
            origin_step=run.plan.origin.step,
            origin_epoch=run.plan.origin.epoch,
            written=None if self._written is None else sorted(self._written),
        )
        self._update.settle()
        # in training mode: schedule-free optimizers resume from their training weights
        save_state(run.accelerator, path, state, self._update.write_states)
        if run.options.output.save_state_to_huggingface:
            run.uploads.add(path)

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
        uploads = self._run.uploads
        for file in (*self._beside(path), *self._beside(ema_path(path))):
            uploads.when_free(file, remove_outdated)
        # averages are removed with their weights, so both must be uploaded
        uploads.when_free(ema_path(path), lambda _: uploads.when_free(path, remove_outdated))
