"""Go through images with a model that describes them: read ahead, batches, progress, what is left out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from library.captioning.caption_files import Size, Target
from library.captioning.options import Work
from library.config.work_progress import WorkProgress
from library.data.image_io import read_image
from library.errors import UserError
from library.interrupt import Interrupt

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SHOWN = 5


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """An image as the model takes it."""

    path: Path
    size: Size  # (W, H) of the upright image
    prepared: T


class Describer(Protocol):
    """A model with what belongs to it."""

    def prepare(self, pixels: np.ndarray) -> Any:
        """Turn uint8 (H, W, 3) RGB into what ``describe`` takes; called in several threads."""
        ...

    def describe(self, images: Sequence[Loaded[Any]]) -> Sequence[str]:
        """Return one text for each image."""
        ...


@dataclass
class Outcome:
    """The numbers of texts that were written and kept, and the images that could not be read."""

    written: int = 0
    kept: int = 0
    unreadable: int = 0


def describe_all(images: Sequence[Path], target: Target, work: Work, load: Callable[[], Describer]) -> Outcome:
    """Write a text for each image that has none yet.

    Args:
        load: makes the model; called only if there is something to describe.

    Raises:
        UserError: an image that cannot be read, with ``--on_bad_image stop``; of the model.
        SystemExit: after Ctrl-C or SIGTERM; texts that are written stay, and the same command continues.
    """
    wanted = [image for image in images if not target.kept(image)]
    outcome = Outcome(kept=len(images) - len(wanted))
    if work.dry_run:
        return _tell(wanted, outcome)
    if wanted:
        describer = load()
        with Interrupt("stopping: this batch is finished; the same command continues") as interrupt:
            try:
                _go_through(wanted, describer, target, work, outcome, interrupt)
            finally:
                target.close()
    logger.info(
        "%d written, %d kept%s%s",
        outcome.written,
        outcome.kept,
        " (--overwrite writes them anew)" if outcome.kept else "",
        f", {outcome.unreadable} images unreadable" if outcome.unreadable else "",
    )
    return outcome


def _tell(wanted: Sequence[Path], outcome: Outcome) -> Outcome:
    for image in wanted[:_SHOWN]:
        logger.info("would describe: %s", image)
    more = f" (and {len(wanted) - _SHOWN} more)" if len(wanted) > _SHOWN else ""
    logger.info("dry run: %d images to describe%s, %d kept; nothing is written", len(wanted), more, outcome.kept)
    return outcome


def _go_through(
    wanted: Sequence[Path], describer: Describer, target: Target, work: Work, outcome: Outcome, interrupt: Interrupt
) -> None:
    with WorkProgress("describing images", "images", simple=False) as progress:
        for batch in _batches(wanted, describer.prepare, work, outcome):
            for image, text in zip(batch, describer.describe(batch), strict=True):
                target.put(image.path, text, image.size)
                outcome.written += 1
                if work.debug:
                    print(f"{image.path}: {text}", flush=True)
            progress.update(outcome.written + outcome.unreadable, len(wanted))
            if interrupt.requested:
                logger.warning("stopped: %d written; the same command continues", outcome.written)
                raise SystemExit(interrupt.exit_code)


def _batches(
    paths: Sequence[Path], prepare: Callable[[np.ndarray], T], work: Work, outcome: Outcome
) -> Iterator[list[Loaded[T]]]:
    """Yield batches in the images' order; unreadable images are named and left out."""
    loaded = _readable(_read_ahead(paths, prepare, work), work, outcome)
    while batch := list(islice(loaded, work.batch_size)):
        yield batch


def _readable(results: Iterator[Loaded[T] | UserError], work: Work, outcome: Outcome) -> Iterator[Loaded[T]]:
    for result in results:
        if not isinstance(result, UserError):
            yield result
        elif work.stop_on_bad_image:
            raise result
        else:
            outcome.unreadable += 1
            logger.warning("%s; left out (--on_bad_image skip)", result)


def _read_ahead(
    paths: Sequence[Path], prepare: Callable[[np.ndarray], T], work: Work
) -> Iterator[Loaded[T] | UserError]:
    def read(path: Path) -> Loaded[T] | UserError:
        try:
            pixels = read_image(path)
        except UserError as error:
            return error
        return Loaded(path, (pixels.shape[1], pixels.shape[0]), prepare(pixels))

    if not work.readers:
        yield from map(read, paths)
        return
    pool: Executor = ThreadPoolExecutor(work.readers)
    with pool if paths else nullcontext():
        waiting: deque[Future[Loaded[T] | UserError]] = deque()
        ahead = work.batch_size + work.readers
        rest = iter(paths)
        try:
            waiting.extend(pool.submit(read, path) for path in islice(rest, ahead))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, path) for path in islice(rest, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
