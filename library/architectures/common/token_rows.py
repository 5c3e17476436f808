"""Turn captions into rows of tokens of one length, for text encoders that are language models, and find what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.architectures.conditioning import CaptionLength


def token_ids(tokenizer: Any, caption: str) -> list[int]:
    """Return the tokens of a caption without start and end."""
    # captions are tokenized one by one: batches would start threads, which must not exist before a fork
    return tokenizer(caption, add_special_tokens=False, verbose=False).input_ids


def padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Return ids (B, length) int64, padded on the right, and the mask (B, length) int64, 0 for padding."""
    ids = torch.full((len(rows), length), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def length_of(tokenizer: Any, caption: str, limit: int) -> CaptionLength:
    """Return the number of tokens of a caption, of which ``limit`` are used, and the text that is cut off."""
    found = tokenizer(caption, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    count = len(found.input_ids)
    cut = caption[found.offset_mapping[limit][0] :].strip() if count > limit else ""
    return CaptionLength(count, limit, cut)
