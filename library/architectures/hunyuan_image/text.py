"""Encode captions for HunyuanImage-2.1: states of Qwen2.5-VL, and of byT5 for quoted text, which the image shall show.

Every caption is encoded by itself, without padding: what padding adds is lost time, and rounding would depend on the
batch.

Shape legend: B captions, T tokens of Qwen2.5-VL, G tokens of byT5, D and E their features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common import t5
from library.architectures.conditioning import Conditioning
from library.architectures.hunyuan_image import qwen
from library.architectures.ragged import trimmed

#: tokens of quoted text, the end token included
GLYPH_LENGTH = 128
#: quotes, in the order in which their texts follow; straight single quotes are apostrophes too often
_QUOTES = tuple(re.compile(pattern) for pattern in ('"(.*?)"', "\u2018(.*?)\u2019", "\u201c(.*?)\u201d"))

#: tensor -> its mask: tokens, and what they are encoded to
RAGGED = {
    "vlm_ids": "vlm_mask",
    "vlm_embed": "vlm_mask",
    "vlm_mask": "vlm_mask",
    "byt5_ids": "byt5_mask",
    "byt5_embed": "byt5_mask",
    "byt5_mask": "byt5_mask",
}
ARRAYS = {
    "vlm_embed": ("T", "D"),
    "vlm_mask": ("T",),
    "byt5_embed": ("G", "E"),
    "byt5_mask": ("G",),
}


def glyph_text(caption: str) -> str:
    """Return what byT5 reads of a caption: ``Text "SALE". `` for each quoted text; empty without any."""
    quoted = [text for quotes in _QUOTES for text in quotes.findall(caption)]
    return "".join(f'Text "{text}". ' for text in quoted)


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str]) -> dict[str, Tensor]:
    """Tokenize captions for both encoders, padded to the longest.

    Returns:
        ``vlm_ids`` (B, START + T) and ``vlm_mask`` of the same shape, ``byt5_ids`` and ``byt5_mask`` (B, G), int64; a
        caption without quoted text has no tokens for byT5.
    """
    conversation, glyphs = tokenizers
    texts = [glyph_text(caption) for caption in captions]
    return {
        **_padded("vlm", [qwen.token_ids(conversation, caption) for caption in captions]),
        **_padded("byt5", [_glyph_ids(glyphs, text) if text else [] for text in texts]),
    }


def _glyph_ids(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [*ids[: GLYPH_LENGTH - 1], tokenizer.eos_token_id]


def _padded(name: str, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[place, : len(row)] = 1
    return {f"{name}_ids": ids, f"{name}_mask": mask}


def encode_text(encoders: Sequence[nn.Module | None], tokens: Mapping[str, Tensor]) -> Conditioning:
    """Return the states of both encoders with their masks; without encoders nothing.

    Returns:
        ``vlm_embed`` (B, T, D), ``vlm_mask`` (B, T), ``byt5_embed`` (B, G, E), ``byt5_mask`` (B, G).
    """
    conversation, glyphs = encoders
    if conversation is None or glyphs is None:
        return Conditioning({})
    count = len(tokens["vlm_ids"])
    rows = [{name: tensor[place : place + 1] for name, tensor in tokens.items()} for place in range(count)]
    if count > 1:
        rows = [trimmed(row, RAGGED, axis=1) for row in rows]
    return Conditioning.cat([Conditioning(_encode_one(conversation, glyphs, row)) for row in rows])


def _encode_one(conversation: nn.Module, glyphs: nn.Module, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encode the tokens of one caption, without padding, on each encoder's own device."""
    place = tokens["vlm_ids"].device
    states = qwen.encode(conversation, tokens["vlm_ids"].to(_home(conversation)))
    ids = tokens["byt5_ids"]
    if ids.shape[1]:
        drawn = t5.encode(glyphs, ids.to(_home(glyphs)))
    else:
        drawn = states.new_zeros(1, 0, glyphs.config.d_model)
    return {
        "vlm_embed": states.to(place),
        "vlm_mask": tokens["vlm_mask"][:, qwen.START :],
        "byt5_embed": drawn.to(place),
        "byt5_mask": tokens["byt5_mask"],
    }


def _home(encoder: nn.Module) -> torch.device:
    return next(encoder.parameters()).device


def published_extras(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the content of sd-scripts' cache files beside the conditioning of a caption: whether it quotes text."""
    return {"ocr_mask": row["byt5_mask"].any()}
