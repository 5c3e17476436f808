"""Report and record a step that is not finite: its images, captions and seed, and a file to repeat it."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from library.config.arguments import RunOptions
from library.data.run_plan import RunPlan
from library.errors import UserError
from library.training.checkpoints import OutputNames
from library.training.nonfinite import MOST_IN_A_ROW, BadStep, BatchNote, NonFiniteLoss
from library.training.replay import Recording, write_recording

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

#: most replay files of a run; each holds the trained weights
MOST_FILES = 3
_MOST_IMAGES, _MOST_LETTERS = 8, 80


class BadStepReport:
    """Reports the bad steps of one run; called on all processes, which then report the same.

    Args:
        options: recorded with a step, without secrets.
        names: of the replay files.
    """

    def __init__(
        self, accelerator: Accelerator, options: RunOptions, plan: RunPlan, names: OutputNames, *, seed: int
    ) -> None:
        self._accelerator = accelerator
        self._options = options
        self._plan = plan
        self._names = names
        self._seed = seed
        self._files = 0

    def __call__(self, bad: BadStep, *, ends_run: bool, back_to: int | None) -> None:
        """Warn, or end the run.

        Raises:
            NonFiniteLoss: the run ends.
        """
        rank, notes = self._blamed(bad)
        parts = [self._what(bad, notes)]
        if ends_run and self._options.training.on_nan == "stop":
            parts.append(
                "training has diverged and was stopped; weights saved before are whole. Lower --learning_rate, use "
                "--mixed_precision bf16 or no instead of fp16, or leave such steps out with --on_nan skip or rollback"
            )
        elif ends_run:
            parts.append(
                f"stopped all the same, after {bad.in_a_row} in a row (at most {MOST_IN_A_ROW}); weights saved before "
                "are whole. Lower --learning_rate"
            )
        elif back_to is not None:
            parts.append(f"left out; weights and optimizer went back to those after step {back_to} (--on_nan rollback)")
        else:
            parts.append("its update was left out (--on_nan skip)")
        if file := self._recorded(bad, rank, notes):
            parts[-1] += f". Run the step again with: --replay {file}"
        text = "; ".join(parts)
        if ends_run:
            raise NonFiniteLoss(text)
        if self._accelerator.is_main_process:
            logger.warning(text)

    def _blamed(self, bad: BadStep) -> tuple[int, list[BatchNote]]:
        """Return the process whose batches are not finite (the first, if none or several), and its batches."""
        if self._accelerator.num_processes == 1:
            return 0, bad.batches
        from accelerate.utils import gather_object

        by_rank: list[list[BatchNote]] = gather_object([bad.batches])
        found = [rank for rank, notes in enumerate(by_rank) if not all(note.finite for note in notes)]
        rank = found[0] if found else 0
        return rank, by_rank[rank]

    def _what(self, bad: BadStep, notes: list[BatchNote]) -> str:
        wrong = {name: value for name, value in bad.values.items() if not math.isfinite(value)}
        values = ", ".join(f"{name} {value}" for name, value in (wrong or bad.values).items())
        text = f"step {bad.step} (seed {self._seed}): {values}"
        named = [n for n in notes if not n.finite] or notes
        images = [pair for note in named for pair in zip(note.paths, note.captions, strict=True)]
        if not images:
            return text
        shown = [f"{path} {_short(caption)!r}" for path, caption in images[:_MOST_IMAGES]]
        more = f" and {len(images) - len(shown)} more" if len(images) > len(shown) else ""
        return f"{text}; its images: {', '.join(shown)}{more}"

    def _recorded(self, bad: BadStep, rank: int, notes: list[BatchNote]) -> str | None:
        """Write the replay file on the main process; return its path on all."""
        if not bad.batches or not bad.weights or self._files >= MOST_FILES:
            return None  # nothing to record: a whole model has no copy from before the step
        self._files += 1
        path = self._names.replay(bad.step)
        if self._accelerator.is_main_process:
            try:
                recording = Recording.of(
                    bad,
                    notes,
                    rank=rank,
                    processes=self._accelerator.num_processes,
                    options=self._options,
                    plan=self._plan,
                    seed=self._seed,
                )
                write_recording(path, recording, bad.weights)
            except (UserError, OSError) as error:
                logger.warning("the step cannot be recorded: %s", error)
                return None
        return str(path)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."
