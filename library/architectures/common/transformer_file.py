"""Families whose trained model is one file with the transformer alone; the other parts are files of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from library.architectures.common.key_map import TensorLayout
from library.architectures.common.model_writing import laid_out, refuse_own_source, write_file
from library.architectures.part import DENOISER
from library.architectures.whole_models import SavedModel, WholeModels


class TransformerFile(WholeModels):
    """Put before ``Architecture`` among a family's bases."""

    has_own_encoders = False
    model_forms = ("safetensors",)

    @abstractmethod
    def saved_layout(self, checkpoint: Any) -> TensorLayout:
        """Return the published names of the transformer's tensors."""

    def write(self, path: Path, checkpoint: Any, trained: Mapping[str, nn.Module], saved: SavedModel) -> None:
        """Write the transformer, by its published names."""
        refuse_own_source(path, self.sources(checkpoint))
        tensors = laid_out(self.saved_layout(checkpoint), trained[DENOISER].state_dict())
        write_file(path, tensors, dtype=saved.dtype, metadata=saved.metadata, counters=saved.counters)
