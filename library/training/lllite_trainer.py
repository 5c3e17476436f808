"""The published class of training ControlNet-LLLites, which entry scripts and wrappers subclass."""

from __future__ import annotations

from library.training.kinds.lllite import LLLite
from library.training.trainer import Trainer


class LLLiteTrainer(Trainer):
    """Train a ControlNet-LLLite."""

    kind = LLLite
