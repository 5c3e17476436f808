"""Names of a run's files, the times of saves, and the retention of older files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from library.files.atomic import MANIFEST_NAME, remove_tree

logger = logging.getLogger(__name__)

#: the record in each state folder
STATE_FILE = "train_state.json"
#: of files of weights
_ENDINGS = (".safetensors", ".ckpt", ".pt")


@dataclass(frozen=True)
class OutputNames:
    """File and folder names as published; ``stem`` is ``--output_name`` or ``None``."""

    directory: Path
    stem: str | None
    extension: str  # without the dot; empty for folders

    def final(self) -> Path:
        return self._place(self.stem or "last")

    def epoch(self, epoch: int) -> Path:
        return self._place(f"{self.stem or 'epoch'}-{epoch:06d}")

    def step(self, step: int) -> Path:
        return self._place(f"{self.stem or 'at'}-step{step:08d}")

    def best(self) -> Path:
        """Return the name of the weights with the lowest validation loss."""
        return self._place(f"{self.stem or 'last'}-best")

    def _place(self, name: str) -> Path:
        return self.directory / (f"{name}.{self.extension}" if self.extension else name)

    def replay(self, step: int) -> Path:
        """Return the name of the recording of a step that was not finite; its extension differs, because it is no
        weights file for use."""
        return self.directory / f"{self.stem or 'at'}-step{step:08d}.replay"

    def final_state(self) -> Path:
        return self.directory / f"{self.stem or 'last'}-state"

    def epoch_state(self, epoch: int) -> Path:
        return self.directory / f"{self.stem or 'epoch'}-{epoch:06d}-state"

    def step_state(self, step: int) -> Path:
        return self.directory / f"{self.stem or 'at'}-step{step:08d}-state"


@dataclass(frozen=True)
class SavePolicy:
    """The times at which weights and states are saved, and how many are kept."""

    every_n_epochs: int | None
    every_n_steps: int | None
    last_n_epochs: int | None
    last_n_steps: int | None
    last_n_epochs_state: int | None
    last_n_steps_state: int | None
    save_state: bool
    save_state_on_train_end: bool

    @staticmethod
    def every_from_ratio(num_epochs: int, ratio: int) -> int:
        """Return the interval of ``--save_n_epoch_ratio``: at least ``ratio`` saves over the run."""
        return max(1, num_epochs // ratio)

    def saves_after_epoch(self, epoch: int, num_epochs: int) -> bool:
        """Whether to save after ``epoch``, counted from 1; the last epoch's weights are the final file."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0 and epoch < num_epochs

    def saves_after_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def epoch_to_remove(self, epoch: int) -> int | None:
        """Return the epoch whose weights are removed when ``epoch`` is saved."""
        return self._outdated(epoch, self.every_n_epochs, self.last_n_epochs)

    def epoch_state_to_remove(self, epoch: int) -> int | None:
        return self._outdated(epoch, self.every_n_epochs, self.last_n_epochs_state or self.last_n_epochs)

    @staticmethod
    def _outdated(epoch: int, every: int | None, keep: int | None) -> int | None:
        if every is None or keep is None:
            return None
        outdated = epoch - every * keep
        return outdated if outdated > 0 else None

    def step_to_remove(self, step: int) -> int | None:
        """Return the step whose weights are removed; ``--save_last_n_steps`` counts steps, not files: older than ``step
        - n``."""
        return self._outdated_step(step, self.last_n_steps)

    def step_state_to_remove(self, step: int) -> int | None:
        return self._outdated_step(step, self.last_n_steps_state or self.last_n_steps)

    def _outdated_step(self, step: int, keep: int | None) -> int | None:
        if self.every_n_steps is None or keep is None:
            return None
        oldest_kept = step - keep
        outdated = (oldest_kept - 1) // self.every_n_steps * self.every_n_steps
        return outdated if outdated > 0 else None


def is_folder_of_weights(path: Path) -> bool:
    """Whether a path of weights is a folder by its name, which may have dots."""
    return path.suffix not in _ENDINGS


def ema_path(path: Path) -> Path:
    """Return the file or folder of averaged weights (``--ema_decay``) beside that of the weights."""
    if is_folder_of_weights(path):
        return path.with_name(f"{path.name}-ema")
    return path.with_name(f"{path.stem}-ema{path.suffix}")


def is_state(path: Path) -> bool:
    """Whether a folder is a state of training."""
    return path.is_dir() and (path / STATE_FILE).is_file()


def is_model(path: Path) -> bool:
    """Whether a folder is a model that a run saved: a pipeline, or a ControlNet."""
    described = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    return described and (path / MANIFEST_NAME).is_file()


def remove_outdated(path: Path) -> None:
    """Remove weights or a state by retention; a failure is a warning and never ends the run.

    Averages are removed with their weights. Anything else than weights or a state stays.
    """
    if (averaged := ema_path(path)).exists():
        remove_outdated(averaged)
    try:
        if path.is_dir() and not is_state(path) and not is_model(path):
            logger.warning("%s: kept, as this folder holds no state of training and no model", path)
            return
        if path.is_dir():
            remove_tree(path)
        elif path.exists():
            path.unlink()
        else:
            return
        logger.info("removed %s (retention)", path)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)
