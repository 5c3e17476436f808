"""Encode captions for FLUX.1 and Chroma: CLIP-L's pooled output (not Chroma) and T5's states.

Shape legend: B captions, T tokens of T5, D features of T5, P of CLIP-L's pooled output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common import clip_text, t5
from library.architectures.conditioning import Conditioning

#: width of CLIP-L's pooled output
POOLED = 768


def tokenize(
    clip_tokenizer: Any | None, t5_tokenizer: Any, captions: Sequence[str], *, t5_length: int
) -> dict[str, Tensor]:
    """
    Returns:
        ``t5_ids``, ``t5_mask`` (B, T) int64 and, with CLIP, ``clip_ids`` (B, 77) int64 and ``clip_end`` (B,) int64, the
        place of the end token.
    """
    ids, mask = t5.tokenize(t5_tokenizer, captions, length=t5_length)
    tokens = {"t5_ids": ids, "t5_mask": mask}
    if clip_tokenizer is not None:
        found = clip_text.tokenize(clip_tokenizer, captions, max_token_length=None, weighted=False)
        tokens["clip_ids"] = found["input_ids"][:, 0]
        # the first one: padding is the same token
        tokens["clip_end"] = (tokens["clip_ids"] == clip_tokenizer.eos_token_id).int().argmax(dim=1)
    return tokens


def pooled_clip(encoder: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """Return the normed last state of the end token, (B, P)."""
    states = encoder(tokens["clip_ids"]).last_hidden_state  # (B, 77, P)
    return states[torch.arange(len(states), device=states.device), tokens["clip_end"]]


def encode_text(
    clip_encoder: nn.Module | None, t5_encoder: nn.Module | None, tokens: Mapping[str, Tensor], *, apply_t5_mask: bool
) -> Conditioning:
    """Encode tokens on the encoders' devices to ``t5_out`` (B, T, D), ``t5_attn_mask`` (B, T) and ``l_pooled`` (B, P).

    The outputs of missing encoders are left out.

    Args:
        apply_t5_mask: keep T5 from attending to padding (--apply_t5_attn_mask).
    """
    tensors: dict[str, Tensor] = {}
    if t5_encoder is not None:
        mask = tokens["t5_mask"]
        states = t5.encode(t5_encoder, tokens["t5_ids"], mask if apply_t5_mask else None)
        tensors |= {"t5_out": states, "t5_attn_mask": mask}
    if clip_encoder is not None:
        tensors["l_pooled"] = pooled_clip(clip_encoder, tokens)
    return Conditioning(tensors)


def published_extras(row: Mapping[str, Tensor], *, apply_t5_attn_mask: bool) -> dict[str, Tensor]:
    """Return what published cache files hold beside the conditioning of a caption.

    Returns:
        ``txt_ids`` (T, 3) float32, zeros; ``apply_t5_attn_mask`` () bool; and for Chroma, which has no CLIP-L,
        ``l_pooled`` (768,), zeros.
    """
    extras = {
        "txt_ids": torch.zeros(len(row["t5_out"]), 3),
        "apply_t5_attn_mask": torch.tensor(apply_t5_attn_mask),
    }
    return extras if "l_pooled" in row else {**extras, "l_pooled": torch.zeros(POOLED)}
