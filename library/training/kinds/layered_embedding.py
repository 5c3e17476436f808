"""Textual inversion with vectors of their own for each cross-attention layer of the U-Net (XTI).

Voynov et al. 2023, "P+: Extended Textual Conditioning in Text-to-Image Generation" (arXiv:2303.09522).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.architectures.base import Architecture
from library.architectures.common.grown_embedding import give_each_layer
from library.errors import UserError
from library.inference.textual_inversion import in_layer_order, read_layered_vectors
from library.training.kinds.base import ParameterGroup
from library.training.kinds.embedding import Embedding
from library.training.models import Models


class LayeredEmbedding(Embedding):
    """Train the vectors of one new word for each layer."""

    modelspec_suffix = "/textual-inversion-xti"
    tracker_name = "xti"

    def __init__(self, architecture: Architecture, options: Any, checkpoint: Any, **more: Any) -> None:
        super().__init__(architecture, options, checkpoint, **more)
        self._names: tuple[str, ...] = ()  # of the layers

    @classmethod
    def start_of(cls, options: Any, encoders: int) -> list[Tensor]:
        return list(read_layered_vectors(Path(options.embedding.weights), flag="--weights").values())

    def read_start(self, encoders: int) -> list[Tensor]:
        path = Path(self.options.embedding.weights)
        return [in_layer_order(read_layered_vectors(path, flag="--weights"), self._names, flag=f"--weights {path}")]

    def attach(self, models: Models) -> list[ParameterGroup]:
        layers = self.architecture.text_layers(models.denoiser)
        if not layers or len(models.text_encoders) != 1:
            raise UserError("XTI: this model has no layers that read texts of their own; give SD 1.x or 2.x")
        self._names, self.layers = tuple(layers), len(layers)
        groups = super().attach(models)
        give_each_layer(list(layers.values()))
        return groups

    def tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        (rows,) = super().tensors(dtype).values()
        return {name: part.clone() for name, part in zip(self._names, rows.chunk(self.layers), strict=True)}

    def rows(self, count: int) -> list[tuple[str, str]]:
        (name, text), *others = super().rows(count)
        return [(name, f"{text}, in {self.layers} layers"), *others]
