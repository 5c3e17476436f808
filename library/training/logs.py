"""Show and record a run: the summary before the first step, progress, and trackers.

Keys of trackers are the published ones (``loss/current``, ``loss/average``, ``lr/unet``, ...).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.console import PLAIN_LINE_INTERVAL, is_rich, make_bar, stderr_console
from library.errors import NoEffect, UserError, did_you_mean

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackerSettings:
    """The targets of metrics; TensorBoard is always on, in the output folder unless another one is given."""

    directory: Path
    backends: tuple[str, ...]
    tracker_name: str
    init_kwargs: Mapping[str, Mapping[str, Any]]
    wandb_api_key: str | None = field(default=None, repr=False)
    #: ``--log_tracker_config`` and its content
    config_file: str | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def make(
        *,
        logging_dir: str | None,
        output_dir: Path,
        output_name: str | None,
        log_prefix: str | None,
        log_with: str | None,
        tracker_name: str | None,
        wandb_run_name: str | None,
        wandb_api_key: str | None = None,
        config_file: str | None = None,
        tracker_config: Mapping[str, Any],
    ) -> TrackerSettings:
        stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
        base = Path(logging_dir) if logging_dir else output_dir / "logs"
        backends: tuple[str, ...] = ("tensorboard",)
        # all: those that are installed
        if log_with == "wandb" or (log_with == "all" and importlib.util.find_spec("wandb") is not None):
            backends = ("tensorboard", "wandb")
        elif log_with == "all":
            logger.warning("--log_with all: the package wandb is not installed; TensorBoard alone is used")
        kwargs = {name: dict(values) for name, values in tracker_config.items() if isinstance(values, Mapping)}
        if wandb_run_name:
            kwargs.setdefault("wandb", {})["name"] = wandb_run_name
        return TrackerSettings(
            # TensorBoard shows the folder's name for a run
            base / f"{log_prefix or ''}{stamp}{f'-{output_name}' if output_name else ''}",
            backends,
            tracker_name or "network_train",
            kwargs,
            wandb_api_key,
            config_file,
            tracker_config,
        )

    def check(self) -> list[NoEffect]:
        """Check the trackers before anything is loaded; returns warnings of tables without effect.

        Raises:
            UserError: a tracker whose package is missing, or a table of ``--log_tracker_config`` that it cannot take.
        """
        if "wandb" in self.backends and importlib.util.find_spec("wandb") is None:
            raise UserError("--log_with wandb: the package wandb is not installed; run: pip install wandb")
        idle = []
        for name, table in self.tables.items():
            where = f"--log_tracker_config {self.config_file}: [{name}]"
            if name not in _TRACKERS:
                known = " and ".join(_TRACKERS)
                raise UserError(f"{where}: no such tracker{did_you_mean(name, _TRACKERS)}; there are {known}")
            if not isinstance(table, Mapping):
                raise UserError(f"{where}: must be a table of settings, [{name}]")
            if name not in self.backends:
                idle.append(NoEffect(f"{where} has no effect without --log_with {name}"))
                continue
            for key in table:
                if key in _TRACKERS[name]:
                    raise UserError(f"{where} {key}: {_TRACKERS[name][key]}")
                if (taken := _settings_of(name)) is not None and key not in taken:
                    raise UserError(f"{where} {key}: {name} has no such setting{did_you_mean(key, taken)}")
        return idle


#: tracker -> settings that have their own option
_TRACKERS: Mapping[str, Mapping[str, str]] = {
    "tensorboard": {"log_dir": "give it as --logging_dir"},
    "wandb": {"project": "give it as --log_tracker_name", "config": "give --log_config"},
}


def _settings_of(tracker: str) -> list[str] | None:
    """Return the settings of a tracker that ``--log_tracker_config`` may hold; ``None`` if any."""
    if tracker == "wandb":
        import wandb

        opens: Callable[..., Any] = wandb.init
    else:
        from torch.utils.tensorboard import SummaryWriter

        opens = SummaryWriter
    parameters = inspect.signature(opens).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return list(parameters)


class Trackers:
    """accelerate's trackers, opened on the main process only."""

    def __init__(self, accelerator: Accelerator, settings: TrackerSettings, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        if "wandb" in settings.backends and settings.wandb_api_key and accelerator.is_main_process:
            import wandb

            wandb.login(key=settings.wandb_api_key)
        # TensorBoard's hyper-parameter table takes plain values only
        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in config.items()}
        self._directory = settings.directory
        try:
            accelerator.init_trackers(
                settings.tracker_name, config=plain, init_kwargs={k: dict(v) for k, v in settings.init_kwargs.items()}
            )
        except OSError as error:
            raise UserError(
                f"{self._directory}: the log cannot be written ({error.strerror or error}); name another folder with "
                "--logging_dir"
            ) from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._accelerator.trackers:
            with self._or_without(tracker):
                tracker.log(dict(values), step=step)

    def log_by_epoch(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        """Log metrics of an epoch, by epoch (counted from 1) where a tracker has more than one axis."""
        for tracker in self._accelerator.trackers:
            with self._or_without(tracker):
                if tracker.name == "wandb":  # its steps never go back, so the epoch is a separate metric
                    tracker.log({**values, "global_step": step, "epoch": epoch}, step=step)
                else:
                    tracker.log(dict(values), step=epoch)

    def images(self, images: Mapping[str, Image], step: int) -> None:
        """Log sample images, under ``sample_<index>``."""
        import numpy as np

        for tracker in self._accelerator.trackers:
            with self._or_without(tracker):
                if tracker.name == "tensorboard":
                    for name, image in images.items():
                        tracker.tracker.add_image(name, np.asarray(image), global_step=step, dataformats="HWC")
                elif tracker.name == "wandb":
                    import wandb

                    tracker.log({name: wandb.Image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        # not end_training, which would disconnect the processes; they still save the last state together
        for tracker in self._accelerator.trackers:
            with self._or_without(tracker):
                tracker.finish()
        self._accelerator.trackers = []

    @contextlib.contextmanager
    def _or_without(self, tracker: GeneralTracker) -> Iterator[None]:
        """Continue without a tracker if its disk is full: the weights matter, not the log."""
        try:
            if (writer := getattr(tracker, "writer", None)) is not None:
                # TensorBoard's, which opens its file anew for each write; the folder may have been removed
                Path(writer.log_dir).mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            logger.warning(
                "%s: %s has ended, because it cannot be written (%s); training continues without it",
                *(self._directory, tracker.name, error.strerror or error),
            )
            self._accelerator.trackers = [other for other in self._accelerator.trackers if other is not tracker]


def print_summary(rows: Sequence[tuple[str, str]], *, simple: bool) -> None:
    """The one table before the first step."""
    if not is_rich(simple=simple):
        for name, value in rows:
            logger.info("%s: %s", name, value)
        return
    from rich.table import Table

    table = Table(title="training", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    stderr_console().print(table)


class Progress:
    """One progress bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, *, total: int, done: int, simple: bool, enabled: bool) -> None:
        self._total = total
        self._first = done
        self._started = time.monotonic()
        self._last_line = self._started
        self._enabled = enabled
        self._bar: Any = None
        if enabled and is_rich(simple=simple):
            self._bar = make_bar("steps")
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def update(self, step: int, *, epoch: int, loss: float) -> None:
        """``epoch`` counts from 1; ``loss`` is the running average."""
        if not self._enabled:
            return
        now = time.monotonic()
        pace = (now - self._started) / max(1, step - self._first)
        text = f"epoch {epoch}  loss {loss:.4f}  {pace:.2f} s/step"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last_line >= PLAIN_LINE_INTERVAL or step == self._total:
            self._last_line = now
            logger.info("step %d/%d  %s", step, self._total, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
