"""``--debug_dataset``: show the training data in windows or on contact sheets, without loading a model."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.config.console import setup_console
from library.config.core.output import needs_output
from library.config.no_effect import report
from library.config.rules import DATA_RULES, check
from library.data import describe
from library.data.bucketed import BatchRef
from library.data.captions import Progress
from library.data.conditioning import Role, check_roles
from library.data.contact_sheet import LIST_NAME, SheetWriter, Shown, draw_sheet, samples_of
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.image_io import opencv
from library.data.run_plan import RunPlan
from library.data.unread_captions import unread_captions
from library.launched import is_first_process, process_count
from library.training.processes import choose_seed

if TYPE_CHECKING:
    from library.architectures.base import Architecture
    from library.config.arguments import RunOptions

logger = logging.getLogger(__name__)

#: most images on sheets; the batch that exceeds it is the last
MOST_IMAGES = 200
FOLDER = "debug_dataset"

QUIT, NEXT_BATCH, NEXT_EPOCH = ("\x1b", "q"), ("s",), ("e",)
_HELP = "any key: next image; S: next batch; E: next epoch; Esc or Q: end"

Batches = Iterator[list[Shown]]


def show_dataset(options: RunOptions, architecture: Architecture, conditioning_as: Role) -> None:
    """Show the batches of a run in their order; returns when all are shown or written.

    It needs no model. Of several processes only the first shows anything.

    Raises:
        UserError: the data or its options are wrong, as before training.
    """
    setup_console(options.console)
    if not is_first_process():
        return
    rules = (*DATA_RULES, needs_output) if options.output.output_dir else DATA_RULES
    for warning in check(options, architecture, rules=rules):
        logger.warning(warning)
    config = load_dataset_config(options.dataset.dataset_config, options.dataset, options.validation)
    report(unread_captions(config), strict=options.config.strict)
    check_roles(config, conditioning_as, masked_loss=options.loss.masked_loss)
    seed = choose_seed(options.training.seed)
    data = TrainingData(
        config,
        seed=seed,
        latent=architecture.latent,
        prior_loss_weight=options.loss.prior_loss_weight,
        conditioning_as=conditioning_as,
    )
    processes = process_count()
    plan = RunPlan.make(
        batches_per_epoch=data.batches_per_process(processes),
        gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        max_train_steps=options.training.max_train_steps,
        max_train_epochs=options.training.max_train_epochs,
    )
    for name, text in (*describe.summary_rows(data), ("seed", str(seed))):
        logger.info("%s: %s", name, text)
    reason = why_no_windows()
    if reason is None:
        logger.info("in the window, %s", _HELP)
        browse((batches_of(data, plan, epoch, processes) for epoch in range(plan.num_epochs)), _Window().show)
        return
    folder = Path(options.output.output_dir or ".") / FOLDER
    logger.info("images go to files, not to windows: %s", reason)
    total = len(_references(data, plan, 0, processes))
    write_sheets(batches_of(data, plan, 0, processes), folder, total=total)


def batches_of(data: TrainingData, plan: RunPlan, epoch: int, processes: int = 1) -> Batches:
    """Yield the samples of an epoch (from 0), batch by batch; those of several processes in turn, in training order."""
    for number, (step, ref) in enumerate(_references(data, plan, epoch, processes), start=1):
        ref = replace(ref, progress=Progress(step, plan.total_steps))
        batch = data.maker.make(ref, lambda captions: {})  # nothing is tokenized
        yield samples_of(batch, epoch=epoch + 1, step=step + 1, number=number)


def _references(data: TrainingData, plan: RunPlan, epoch: int, processes: int) -> list[tuple[int, BatchRef]]:
    """Return the batches that count in an epoch, with their steps, both from 0."""
    shares = [
        data.batches(epoch, world_size=processes, rank=rank, accumulation=plan.gradient_accumulation_steps)
        for rank in range(processes)
    ]
    return [
        (plan.step_of(epoch, index), ref)
        for index, refs in enumerate(zip(*shares, strict=True))
        for ref in refs
        if ref.weight > 0
    ]


# ---- sheets ----


def write_sheets(batches: Batches, folder: Path, *, total: int) -> None:
    """Write the batches of an epoch up to ``MOST_IMAGES``, and log where they are.

    Args:
        total: batches of the epoch.
    """
    writer = SheetWriter(folder)
    images = done = 0
    for done, samples in enumerate(batches, start=1):  # noqa: B007 - read after the loop
        writer.add(samples)
        images += len(samples)
        if images >= MOST_IMAGES:
            break
    writer.close()
    logger.info("%d batches with %d images are on %d sheets in %s", done, images, writer.sheets, folder)
    logger.info("all captions and metrics are in %s", folder / LIST_NAME)
    if done < total:
        logger.info("%d more batches of the epoch are not shown, as %d images are the most", total - done, MOST_IMAGES)


# ---- windows ----


def browse(epochs: Iterable[Batches], show: Callable[[Shown], str]) -> None:
    """Show one sample after another until the end or a key of ``QUIT``.

    Args:
        show: shows a sample and returns the key that was pressed, in lower case.
    """
    for batches in epochs:
        key = ""
        for samples in batches:
            for sample in samples:
                key = show(sample)
                if key in QUIT:
                    return
                if key in NEXT_BATCH or key in NEXT_EPOCH:
                    break
            if key in NEXT_EPOCH:
                break


def why_no_windows() -> str | None:
    """Return why nothing can be shown on a screen; ``None`` if it can."""
    on_linux = sys.platform.startswith("linux")
    if on_linux and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display"
    gui = [line.split(":", 1)[1].strip() for line in opencv().getBuildInformation().splitlines() if "GUI:" in line]
    if gui and gui[0].upper() == "NONE":
        return "this OpenCV has no windows (for windows, replace opencv-python-headless by opencv-python)"
    if on_linux and not _window_opens():
        return "the display cannot be used"
    return None


def _window_opens() -> bool:
    """Try it in a separate process: without a display, the window system ends the whole program."""
    tried = "import cv2; cv2.namedWindow('w', cv2.WINDOW_NORMAL); cv2.destroyAllWindows()"
    done = subprocess.run([sys.executable, "-c", tried], capture_output=True, timeout=60, check=False)
    return done.returncode == 0


class _Window:
    """OpenCV's window."""

    _NAME = "debug_dataset"

    def show(self, sample: Shown) -> str:
        cv2 = opencv()
        logger.info("%s: %s", Path(sample.path).name, sample.caption)
        sheet = np.asarray(draw_sheet([sample]))
        cv2.imshow(self._NAME, np.ascontiguousarray(sheet[:, :, ::-1]))  # OpenCV takes BGR
        while True:
            code = cv2.waitKey(100)
            if code != -1:
                return chr(code & 0xFF).lower()
            if cv2.getWindowProperty(self._NAME, cv2.WND_PROP_VISIBLE) < 1:
                return QUIT[0]  # closed by its own button
