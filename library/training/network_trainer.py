"""The published class of adapter training, which entry scripts and wrappers subclass."""

from __future__ import annotations

from library.training.kinds.adapter_with_word import AdapterWithWord
from library.training.trainer import Trainer


class NetworkTrainer(Trainer):
    """Train an adapter (such as LoRA) for the model's denoiser and text encoders, and a new word beside it."""

    kind = AdapterWithWord
