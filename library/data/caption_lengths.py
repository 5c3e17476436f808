"""Count the tokens of a run's captions, and find the text that the text encoder never sees."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from library.architectures.base import Architecture
from library.architectures.conditioning import CaptionLength
from library.data.captions import CaptionRules, final_caption
from library.data.records import ImageRecord
from library.randomness import python_rng

logger = logging.getLogger(__name__)

#: random choices of a caption with wildcards, to find a long one
DRAWS = 8

#: how many of the longest captions are tokenized; cleaning and counting take up to 0.5 ms each
_MOST_COUNTED = 2000
#: characters shown of a text that is cut off
_SHOWN = 80

#: for captions without choices, which draw nothing
_UNUSED = random.Random(0)

Measure = Callable[[str], CaptionLength]


def measure_of(
    architecture: Architecture, tokenizers: Sequence[Any], *, max_token_length: int | None, weighted: bool
) -> Measure:
    """Return a function that counts a caption's tokens as a run's text encoders do."""
    return lambda caption: architecture.caption_length(
        tokenizers, architecture.worded(caption, "caption"), max_token_length=max_token_length, weighted=weighted
    )


def longest_uses(text: str, rules: CaptionRules) -> list[str]:
    """Return captions of an image at full length: nothing is dropped, tags are in their order.

    With wildcards these are samples: every line, with several random choices.
    """
    whole = replace(
        rules, dropout_rate=0.0, dropout_every_n_epochs=0, tag_dropout_rate=0.0, warmup_step=0, shuffle=False
    )
    if not rules.wildcards:
        return [final_caption(text, whole, epoch=0, rng=_UNUSED)]
    uses = (
        final_caption(line, whole, epoch=0, rng=python_rng("longest caption", draw))
        for line in [line for line in text.splitlines() if line.strip()] or [text]
        for draw in range(DRAWS)
    )
    return list(dict.fromkeys(uses))


def length_of_longest(measure: Measure) -> Callable[[str, CaptionRules], CaptionLength]:
    """Return a function of text and rules that measures equal ones, such as class tokens, once."""

    @cache
    def longest(text: str, rules: CaptionRules) -> CaptionLength:
        return max((measure(use) for use in longest_uses(text, rules)), key=lambda length: length.tokens)

    return longest


def warn_of_cut_captions(
    captioned: Iterable[tuple[ImageRecord, CaptionRules]],
    measure: Measure,
    *,
    length_option: str = "",
    tokens_of_words: int = 0,
) -> None:
    """Warn once of captions that are cut, with their number and the longest.

    Args:
        captioned: every image of a run with the rules of its caption.
        measure: counts the tokens of a caption.
        length_option: the option that makes the text encoder read more; empty for none.
        tokens_of_words: how many tokens more than one the words of embeddings have.
    """
    shortest = measure("a")
    # without the tokens of a system prompt, which every caption has
    limit = shortest.limit - max(shortest.tokens - 1, 0)
    # a token has at least one byte of text, save those of embeddings; so short captions need not be tokenized
    limit -= tokens_of_words
    uses = ((record, use) for record, rules in captioned for use in longest_uses(record.caption, rules))
    long = [(record, use) for record, use in uses if len(use.encode("utf-8", "replace")) >= limit]
    long.sort(key=lambda pair: -len(pair[1]))
    cut: dict[str, int] = {}  # image -> tokens
    longest = None
    for record, use in long[:_MOST_COUNTED]:
        length = measure(use)
        if not length.cut:
            continue
        cut[str(record.path)] = length.tokens
        if longest is None or length.tokens > longest[1].tokens:
            longest = (record, length)
    if longest is None:
        return
    record, length = longest
    at_least = "at least " if len(long) > _MOST_COUNTED else ""
    images = "1 image" if len(cut) == 1 else f"{len(cut)} images"
    remedy = f", or let it read more with --{length_option}" if length_option else ""
    logger.warning(
        "the captions of %s%s are cut, as the text encoder reads %d tokens; the longest is that of %s with %d, which "
        'loses "%s": shorten them%s',
        *(at_least, images, length.limit, record.path, length.tokens, shortened(length.cut), remedy),
    )


def shortened(text: str) -> str:
    """Return the beginning of a text for a message."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
