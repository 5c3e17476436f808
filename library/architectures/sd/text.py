"""Encode captions for Stable Diffusion 1.x/2.x.

Shape legend: B captions, n windows of 77 tokens (start, 75 of the caption, end), T = 75n + 2 tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from library.architectures.common import clip_text
from library.architectures.common.clip_text import WINDOW, emphasise, join_windows
from library.architectures.common.grown_embedding import by_layer, joined_layers, layers_of
from library.architectures.conditioning import Conditioning

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def load_tokenizer(folder: Path, *, v2: bool) -> CLIPTokenizer:
    return clip_text.load_tokenizer(folder, padding=clip_text.OPENCLIP_PADDING if v2 else None)


def encode_text(
    text_encoder: nn.Module, tokens: Mapping[str, Tensor], *, clip_skip: int | None, emphasis: str = "original"
) -> Conditioning:
    """Encode tokens on the encoder's device to ``context`` (B, T, D), in the encoder's dtype.

    If a word has other vectors for each layer of the U-Net, each caption is encoded for each of them: (B, L * T, D).

    Args:
        clip_skip: None or 1 takes the last layer, 2 the one before it, and so on; the encoder's final norm is applied
            in any case. SD 2.x's encoder is loaded without its unused last block, so the same counting holds.
        emphasis: what it keeps, see ``emphasise``.
    """
    if (layers := layers_of(text_encoder)) > 1:
        tokens = by_layer(text_encoder, tokens)
    ids = tokens["input_ids"]
    batch, windows, _ = ids.shape
    flat = ids.reshape(batch * windows, WINDOW)
    if clip_skip is None or clip_skip <= 1:
        states = text_encoder(flat).last_hidden_state
    else:
        hidden = text_encoder(flat, output_hidden_states=True).hidden_states  # embeddings first, then every layer
        states = text_encoder.final_layer_norm(hidden[-clip_skip])
    states = join_windows(states.reshape(batch, windows, WINDOW, -1))  # (B, n, 77, D) -> (B, T, D)
    if "weights" in tokens:
        states = emphasise(states, join_windows(tokens["weights"].unsqueeze(-1)), emphasis)
    return Conditioning({"context": joined_layers(states, layers)})
