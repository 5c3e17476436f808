"""Encode captions for SD3: states and pooled outputs of CLIP-L and CLIP-G, states of T5-XXL.

Esser et al. 2024 (arXiv:2403.03206), appendix B.1, "Improved text conditioning".

Shape legend: B captions, 77 tokens of CLIP, T tokens of T5, D features of T5, L and G features of CLIP-L and CLIP-G.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.architectures.common import clip_text, t5
from library.architectures.conditioning import Conditioning
from library.randomness import Draw


def load_tokenizers(first: Any, second: Any, third: Any | None) -> list[Any]:
    """Load the tokenizers of CLIP-L, CLIP-G and, if it is used, T5 from the folders of their files."""
    clips = [clip_text.load_tokenizer(first), clip_text.load_tokenizer(second, padding=clip_text.OPENCLIP_PADDING)]
    return clips if third is None else [*clips, t5.load_tokenizer(third)]


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str], *, t5_length: int) -> dict[str, Tensor]:
    """Tokenize captions for every encoder.

    Returns:
        ``l_ids``, ``g_ids``, ``l_mask``, ``g_mask`` (B, 77) int64, the masks 1 up to the end token; with a third
        tokenizer ``t5_ids`` and ``t5_mask`` (B, T) int64.
    """
    tokens: dict[str, Tensor] = {}
    for name, tokenizer in zip("lg", tokenizers, strict=False):
        found = clip_text.tokenize(tokenizer, captions, max_token_length=None, weighted=False)
        ids = found["input_ids"][:, 0]
        # the first one: CLIP-L's padding is the same token
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1, keepdim=True)
        tokens |= {f"{name}_ids": ids, f"{name}_mask": (torch.arange(ids.shape[1]) <= end).long()}
    if len(tokenizers) > 2:
        tokens["t5_ids"], tokens["t5_mask"] = t5.tokenize(tokenizers[2], captions, length=t5_length)
    return tokens


@dataclass(frozen=True)
class Masks:
    """The encoders with masked padding."""

    clip: bool = False  # --apply_lg_attn_mask
    t5: bool = False  # --apply_t5_attn_mask


def encode_text(encoders: Sequence[nn.Module | None], tokens: Mapping[str, Tensor], masks: Masks) -> Conditioning:
    """Return the outputs of the encoders; those of missing encoders are left out.

    Returns:
        ``lg_out`` (B, 77, L + G), ``lg_pooled`` (B, P), ``clip_l_attn_mask``, ``clip_g_attn_mask`` (B, 77), and with
        T5 ``t5_out`` (B, T, D) and ``t5_attn_mask`` (B, T).
    """
    first, second, *rest = encoders
    tensors: dict[str, Tensor] = {}
    if first is not None and second is not None:
        states, pooled = zip(
            *(
                _clip(encoder, tokens[f"{name}_ids"], tokens[f"{name}_mask"], masked=masks.clip)
                for name, encoder in (("l", first), ("g", second))
            ),
            strict=True,
        )
        tensors |= {
            "lg_out": torch.cat(states, dim=-1),
            "lg_pooled": torch.cat(pooled, dim=-1),
            "clip_l_attn_mask": tokens["l_mask"],
            "clip_g_attn_mask": tokens["g_mask"],
        }
    if rest and rest[0] is not None:
        # T5 may have its own device
        device, home = tokens["t5_ids"].device, next(rest[0].parameters()).device
        mask = tokens["t5_mask"].to(home) if masks.t5 else None
        found = t5.encode(rest[0], tokens["t5_ids"].to(home), mask).to(device)
        tensors |= {"t5_out": found, "t5_attn_mask": tokens["t5_mask"]}
    return Conditioning(tensors)


def _clip(encoder: nn.Module, ids: Tensor, mask: Tensor, *, masked: bool) -> tuple[Tensor, Tensor]:
    """Return the second-to-last layer's states (B, 77, D), without the final norm, and the pooled output (B, P).

    Without a projection, the pooled output is the end token's last state.
    """
    output = encoder(ids, attention_mask=mask if masked else None, output_hidden_states=True)
    # the mask ends with the end token
    end = output.last_hidden_state[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]
    if hasattr(encoder, "text_projection"):
        # row by row: the rounding of small products depends on the number of rows, so caches would differ
        pooled = torch.cat([encoder.text_projection(row) for row in end.split(1)])
    else:
        pooled = end
    return output.hidden_states[-2], pooled


# ---- what the transformer is given ----


@dataclass(frozen=True)
class Dropouts:
    """The share of samples that are trained without an encoder's output.

    Attributes:
        l_states, l_pooled: features of CLIP-L in ``lg_out`` and ``lg_pooled``; the others are CLIP-G's.
    """

    clip_l: float
    clip_g: float
    t5: float
    l_states: int
    l_pooled: int


def without_dropped(encoded: Conditioning, dropouts: Dropouts, draw: Draw) -> Conditioning:
    """Set the outputs and masks of randomly left-out encoders to zero, drawn for each sample and encoder."""
    tensors = dict(encoded.tensors)

    def drop(rate: float, name: str, tensor: str, features: slice = slice(None)) -> None:
        if not rate or tensor not in tensors:
            return
        whole = tensors[tensor]
        dropped = [float(torch.rand((), generator=generator)) < rate for generator in draw.generators(name)]
        chosen = torch.tensor(dropped).to(whole.device, non_blocking=True)  # (B,) bool
        changed = torch.zeros(whole.shape[-1], dtype=torch.bool, device=whole.device)
        changed[features] = True
        tensors[tensor] = whole.masked_fill(chosen.view(-1, *[1] * (whole.dim() - 1)) & changed, 0)

    for rate, name, states, pooled in (
        (dropouts.clip_l, "clip_l", slice(dropouts.l_states), slice(dropouts.l_pooled)),
        (dropouts.clip_g, "clip_g", slice(dropouts.l_states, None), slice(dropouts.l_pooled, None)),
    ):
        drop(rate, f"{name} dropout", "lg_out", states)
        drop(rate, f"{name} dropout", "lg_pooled", pooled)
        drop(rate, f"{name} dropout", f"{name}_attn_mask")
    drop(dropouts.t5, "t5 dropout", "t5_out")
    drop(dropouts.t5, "t5 dropout", "t5_attn_mask")
    return Conditioning(tensors)


def context_of(conditioning: Conditioning, width: int) -> Tensor:
    """Return CLIP's states, padded with zeros to T5's width, followed by T5's: (B, 77 + T, D).

    Without T5, 77 rows of zeros are used instead, as published; diffusers' pipeline takes ``max_sequence_length`` rows.
    """
    clip = conditioning["lg_out"]
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    states = conditioning.tensors.get("t5_out")
    return torch.cat([clip, torch.zeros_like(clip) if states is None else states.to(clip.dtype)], dim=1)


def published_extras(row: Mapping[str, Tensor], masks: Masks, *, width: int) -> dict[str, Tensor]:
    """Return the contents of sd-scripts' cache files beside the conditioning of a caption.

    Returns:
        ``apply_lg_attn_mask``, ``apply_t5_attn_mask`` () bool; without T5 also ``t5_out`` (77, D) and ``t5_attn_mask``
        (77,), zeros.
    """
    extras = {"apply_lg_attn_mask": torch.tensor(masks.clip), "apply_t5_attn_mask": torch.tensor(masks.t5)}
    if "t5_out" not in row and "lg_out" in row:
        rows = len(row["lg_out"])
        extras |= {"t5_out": torch.zeros(rows, width), "t5_attn_mask": torch.zeros(rows, dtype=torch.int64)}
    return extras
