"""Encode captions for SDXL.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv:2307.01952),
section 2.1: the outputs of the last but one layer of both text encoders, side by side, and the pooled output of the
second.

Shape legend: B captions, n windows of 77 tokens (start, 75 of the caption, end), T = 75n + 2 tokens; D1, D2 features of
the encoders, P of the pooled output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.architectures.common import clip_text
from library.architectures.common.clip_text import WINDOW, emphasise, join_windows
from library.architectures.conditioning import CaptionLength, Conditioning

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


#: between the texts of a caption that has one for each encoder; no written caption has this control character
_SECOND = " \x1f--prompt2 "


def joined(first: str, second: str) -> str:
    """Return one caption for ``tokenize``, of which the first encoder reads ``first`` and the second ``second``."""
    return first if first == second else f"{first}{_SECOND}{second}"


def _texts(caption: str) -> tuple[str, str]:
    """Return what each encoder reads of a caption."""
    first, mark, second = caption.partition(_SECOND)
    return first, second if mark else first


def load_tokenizers(first: Path, second: Path) -> list[CLIPTokenizer]:
    """Load the tokenizers of both encoders, from the folders of their files; they differ in their padding."""
    return [clip_text.load_tokenizer(first), clip_text.load_tokenizer(second, padding=clip_text.OPENCLIP_PADDING)]


def tokenize(
    tokenizers: Sequence[CLIPTokenizer], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
) -> dict[str, Tensor]:
    """Tokenize captions for both encoders, each with its own padding, and its own text where a caption is ``joined``.

    Returns:
        ``input_ids1``, ``input_ids2`` (B, n, 77) int64; ``end`` (B,) int64, the place of the end token in the first
        window of the second, which the pooled output is taken from; if ``weighted``, ``weights1``, ``weights2``
        (B, n, 77) float32.
    """
    tokens: dict[str, Tensor] = {}
    for number, tokenizer in enumerate(tokenizers, start=1):
        read = [_texts(caption)[number - 1] for caption in captions]
        found = clip_text.tokenize(tokenizer, read, max_token_length=max_token_length, weighted=weighted)
        tokens |= {f"{name}{number}": values for name, values in found.items()}
    # the first one: encoder 1's padding is the same token
    tokens["end"] = (tokens["input_ids2"][:, 0] == tokenizers[1].eos_token_id).int().argmax(dim=1)
    return tokens


def caption_length(
    tokenizers: Sequence[CLIPTokenizer], caption: str, *, max_token_length: int | None, weighted: bool
) -> CaptionLength:
    """Return how much of a caption ``tokenize`` keeps; of two texts, the longer one's."""
    # the tokenizers differ only in their padding
    lengths = [
        clip_text.caption_length(tokenizers[0], text, max_token_length=max_token_length, weighted=weighted)
        for text in dict.fromkeys(_texts(caption))
    ]
    return max(lengths, key=lambda length: length.tokens)


def encode_text(
    text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, emphasis: str = "original"
) -> Conditioning:
    """Encode tokens to ``hidden_state1`` (B, T, D1), ``hidden_state2`` (B, T, D2), ``pool2`` (B, P).

    The penultimate layers' states have no final norm. The pooled output is the first window's. ``emphasis`` is what
    emphasis keeps, see ``emphasise``.
    """
    first, second = text_encoders
    states1, _ = _encode(first, tokens["input_ids1"])
    states2, final = _encode(second, tokens["input_ids2"])
    end = final[torch.arange(len(final), device=final.device), tokens["end"]]  # (B, 77, D2) -> (B, D2)
    if "weights1" in tokens:
        states1 = emphasise(states1, join_windows(tokens["weights1"].unsqueeze(-1)), emphasis)
        states2 = emphasise(states2, join_windows(tokens["weights2"].unsqueeze(-1)), emphasis)
    # row by row: the rounding of a product with few rows depends on their number, so caches, and steps with and without
    # them, would differ in the last bit
    pooled = torch.cat([second.text_projection(row) for row in end.split(1)])
    return Conditioning({"hidden_state1": states1, "hidden_state2": states2, "pool2": pooled})


def _encode(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, n, 77) to the last but one layer's states (B, T, D) and the normed last ones of window 1 (B, 77, D)."""
    batch, windows, _ = ids.shape
    output = encoder(ids.reshape(batch * windows, WINDOW), output_hidden_states=True)
    states = output.hidden_states[-2].reshape(batch, windows, WINDOW, -1)
    final = output.last_hidden_state.reshape(batch, windows, WINDOW, -1)
    return join_windows(states), final[:, 0]
