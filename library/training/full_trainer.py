"""The published classes of training whole models, which entry scripts and wrappers subclass."""

from __future__ import annotations

from library.training.kinds.full import DreamBooth, Full
from library.training.trainer import Trainer


class FullTrainer(Trainer):
    """Train the weights of a whole model."""

    kind = Full


class DreamBoothTrainer(Trainer):
    """Train the weights of a whole model, its text encoders too."""

    kind = DreamBooth
