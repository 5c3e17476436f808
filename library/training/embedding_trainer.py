"""The published classes of textual inversion, which entry scripts and wrappers subclass."""

from __future__ import annotations

from library.training.kinds.embedding import Embedding
from library.training.kinds.layered_embedding import LayeredEmbedding
from library.training.trainer import Trainer


class TextualInversionTrainer(Trainer):
    """Train the vectors of a new word."""

    kind = Embedding


class LayeredTextualInversionTrainer(Trainer):
    """Train the vectors of a new word for each layer of the U-Net (XTI)."""

    kind = LayeredEmbedding
