"""Turn captions into CLIP tokens, join states of several windows of tokens, apply emphasis.

Shape legend: B captions, n windows of 77 tokens (start, 75 of the caption, end), T = 75n + 2 tokens, D features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.architectures.common.clean_text import clean_text
from library.architectures.common.emphasis import parse_emphasis
from library.architectures.conditioning import CaptionLength

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WINDOW = 77
BODY = WINDOW - 2  # tokens of the caption in one window


#: attribute of a tokenizer: tokens that stand for several, as a word of an embedding file may
EXPANSIONS = "token_expansions"

#: a word of weighted captions behind which the next window of tokens begins
BREAK = "BREAK"
_BREAKS = re.compile(r"\s*\b(BREAK)\b\s*")

OPENCLIP_PADDING = "!"  # id 0, as OpenCLIP pads


def load_tokenizer(folder: Path, *, padding: str | None = None) -> CLIPTokenizer:
    """Load a tokenizer; ``padding`` is the padding token, the tokenizer's own if not given."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    if padding is not None:
        tokenizer.pad_token = padding
    return tokenizer


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], *, max_token_length: int | None, weighted: bool
) -> dict[str, Tensor]:
    """Clean captions and split them into windows of tokens.

    What is longer than ``max_token_length`` (75, 150 or 225) is cut off. Every window has its own start and end token
    and is padded with the tokenizer's padding: the end token for CLIP-L, id 0 for OpenCLIP's encoders.

    Returns:
        ``input_ids`` (B, n, 77) int64 and, if ``weighted``, ``weights`` (B, n, 77) float32: 1 on start, end, padding.
    """
    windows = _windows(max_token_length)
    # read once, because each of these properties looks its token up again
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    expansions = getattr(tokenizer, EXPANSIONS, {})
    rows: list[list[list[int]]] = []
    weights = torch.ones(len(captions), windows, WINDOW) if weighted else None
    for row, caption in enumerate(captions):
        tokens: list[int] = []
        token_weights: list[float] = []
        for text, weight in _pieces(caption, weighted):
            if text == BREAK:
                filling = -len(tokens) % BODY
                tokens += [padding] * filling
                token_weights += [1.0] * filling
                continue
            # captions are tokenized one by one: batches would start threads, which must not exist before a fork
            found = tokenizer(clean_text(text), add_special_tokens=False, verbose=False).input_ids
            found = [token for one in found for token in expansions.get(one, (one,))]
            tokens += found
            token_weights += [weight] * len(found)
        rows.append([])
        for window in range(windows):
            part = slice(window * BODY, (window + 1) * BODY)
            body = [start, *tokens[part], end]
            rows[-1].append(body + [padding] * (WINDOW - len(body)))
            if weights is not None:
                weights[row, window, 1 : len(body) - 1] = torch.tensor(token_weights[part])
    ids = torch.tensor(rows, dtype=torch.int64).reshape(len(captions), windows, WINDOW)
    return {"input_ids": ids} if weights is None else {"input_ids": ids, "weights": weights}


def _pieces(caption: str, weighted: bool) -> list[tuple[str, float]]:
    """Return the parts of a caption with their weights; ``BREAK`` is a part by itself in weighted ones."""
    if not weighted:
        return [(caption, 1.0)]
    return [
        (part, weight)
        for text, weight in parse_emphasis(caption)
        for part in (_BREAKS.split(text) if BREAK in text else [text])
        if part or not text
    ]


def _windows(max_token_length: int | None) -> int:
    return max((max_token_length or BODY) // BODY, 1)


def tokens_of_words(tokenizer: CLIPTokenizer) -> int:
    """Return how many tokens more than one the words of embeddings have, all together."""
    return sum(len(tokens) - 1 for tokens in getattr(tokenizer, EXPANSIONS, {}).values())


def caption_length(
    tokenizer: CLIPTokenizer, caption: str, *, max_token_length: int | None, weighted: bool
) -> CaptionLength:
    """Return the number of tokens of a caption, and the text that ``tokenize`` cuts off."""
    limit = _windows(max_token_length) * BODY
    expansions = getattr(tokenizer, EXPANSIONS, {})
    count, cut = 0, ""
    for piece, _ in _pieces(caption, weighted):
        if piece == BREAK:
            count += -count % BODY
            continue
        text = clean_text(piece)
        read = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        # where each token begins in the text
        found = zip(read.input_ids, read.offset_mapping, strict=True)
        places = [place for token, place in found for _ in expansions.get(token, (token,))]
        room = limit - count
        if room <= 0:
            cut += text
        elif len(places) > room:
            cut += text[places[room][0] :]
        count += len(places)
    return CaptionLength(count, limit, cut.strip())


def join_windows(states: Tensor) -> Tensor:
    """(B, n, 77, D) -> (B, 75n + 2, D): the first window's start, all bodies, the last window's end."""
    if states.shape[1] == 1:
        return states[:, 0]
    bodies = states[:, :, 1:-1].flatten(1, 2)  # (B, n, 75, D) -> (B, 75n, D)
    return torch.cat([states[:, 0, :1], bodies, states[:, -1, -1:]], dim=1)


def emphasise(states: Tensor, weights: Tensor, keeps: str = "original") -> Tensor:
    """Multiply token states (B, T, D) by weights (B, T, 1), in float32.

    Args:
        keeps: what stays as it was for each caption: "original" for the mean, "abs" for the mean size, "none".
    """
    plain = states.float()
    weighted = plain * weights
    if keeps == "none":
        return weighted.to(states.dtype)
    before, after = (
        (values.abs() if keeps == "abs" else values).mean(dim=(1, 2), keepdim=True) for values in (plain, weighted)
    )
    scale = torch.where(after == 0, torch.ones_like(after), before / after)
    return (weighted * scale).to(states.dtype)
