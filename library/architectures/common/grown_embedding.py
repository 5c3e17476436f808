"""Trained vectors behind a frozen vocabulary, and texts of their own for each layer of a U-Net (XTI).

Gal et al. 2022, "An Image is Worth One Word" (arXiv:2208.01618). Voynov et al. 2023, "P+: Extended Textual Conditioning
in Text-to-Image Generation" (arXiv:2303.09522): a word has other vectors for each cross-attention layer.

Shape legend: B captions, L layers, n windows of 77 tokens, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GrownEmbedding(nn.Module):
    """A frozen table of vectors followed by others, such as trained ones.

    Args:
        table: (tokens, width) of the vocabulary.
        rows: (layers * n, width) of the ``n`` new tokens, whose ids begin at ``first``; layer by layer.
        layers: number of layers with vectors of their own; 1 for the same text in all of them.
    """

    def __init__(self, table: nn.Parameter, rows: nn.Parameter, first: int, layers: int = 1) -> None:
        super().__init__()
        self.weight = table
        self.rows = rows
        self.first = first
        self.layers = layers

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors (..., width) of token ids."""
        known = F.embedding(ids.clamp(max=len(self.weight) - 1), self.weight)
        new = F.embedding((ids - self.first).clamp(0, len(self.rows) - 1), self.rows)
        return torch.where((ids >= self.first).unsqueeze(-1), new.to(known.dtype), known)

    def ids_by_layer(self, ids: Tensor) -> Tensor:
        """(B, n, 77) token ids -> (B * L, n, 77), the ids of all layers of a caption after each other."""
        steps = torch.arange(self.layers, device=ids.device) * (len(self.rows) // self.layers)
        shifted = ids.unsqueeze(1) + steps.view(1, -1, 1, 1)  # (B, L, n, 77)
        return torch.where(ids.unsqueeze(1) >= self.first, shifted, ids.unsqueeze(1)).flatten(0, 1)


def layers_of(text_encoder: nn.Module) -> int:
    """Return for how many layers a text encoder encodes each caption; 1 for the usual single encoding."""
    return getattr(text_encoder.get_input_embeddings(), "layers", 1)


def by_layer(text_encoder: nn.Module, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tokens (B * L, n, 77) with the ids of each layer, from those of captions (B, n, 77)."""
    table: Any = text_encoder.get_input_embeddings()
    others = {name: values.repeat_interleave(table.layers, dim=0) for name, values in tokens.items()}
    return {**others, "input_ids": table.ids_by_layer(tokens["input_ids"])}


def joined_layers(states: Tensor, layers: int) -> Tensor:
    """(B * L, T, D) -> (B, L * T, D): the states of a caption's layers after each other, for ``give_each_layer``."""
    return states.reshape(-1, layers * states.shape[1], states.shape[2])


def give_each_layer(layers: Sequence[Sequence[nn.Module]]) -> None:
    """Let cross-attention modules read their part of states (B, L * T, D).

    Args:
        layers: the modules of each layer, in the order of ``joined_layers``. They are changed for good: afterwards all
            states given to the model must be joined ones.
    """
    for index, modules in enumerate(layers):
        for module in modules:
            module.register_forward_pre_hook(_part(index, len(layers)), with_kwargs=True)


def _part(index: int, count: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
        states = given["encoder_hidden_states"]
        length = states.shape[1] // count
        part = states[:, index * length : (index + 1) * length]  # (B, L * T, D) -> (B, T, D)
        return args, {**given, "encoder_hidden_states": part}

    return hook
