"""A run with its models loaded, and everything that trains, validates and saves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.optim.update import Update
from library.training.batch_losses import BatchLosses
from library.training.kinds.base import Kind
from library.training.models import Models
from library.training.previews import PreviewGenerator
from library.training.run import Run
from library.training.sample_prompts import SamplePrompts
from library.training.saving import Saver
from library.training.validation import Validation


@dataclass(frozen=True)
class LoadedRun:
    """Everything that the loop of a run uses."""

    run: Run
    models: Models
    kind: Kind
    update: Update
    losses: BatchLosses
    saver: Saver
    previews: PreviewGenerator
    prompts: SamplePrompts  # of the previews
    loading: Mapping[str, Any]  # preparation of batches
    validation: Validation | None  # where images are held out

    @property
    def best(self) -> Mapping[str, float]:
        """Return the best validation so far, for state folders."""
        return self.validation.best.state() if self.validation is not None else {}
