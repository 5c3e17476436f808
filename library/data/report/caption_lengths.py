"""How many tokens the captions of a run have, and what the text encoder never sees of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from library.architectures.base import CaptionLength
from library.data.captions import CaptionRules, final_caption
from library.randomness import python_rng

#: draws of the choices in a caption with wildcards, to find a long one
DRAWS = 8

Measure = Callable[[str], CaptionLength]


def longest_uses(text: str, rules: CaptionRules) -> list[str]:
    """Captions that a use of an image may have, at their full length: nothing is dropped, tags are in their order.

    With wildcards some of the many: every line, with several draws of its choices.
    """
    whole = replace(
        rules, dropout_rate=0.0, dropout_every_n_epochs=0, tag_dropout_rate=0.0, warmup_step=0, shuffle=False
    )
    lines = [line for line in text.splitlines() if line.strip()] if rules.wildcards else []
    draws = range(DRAWS if rules.wildcards else 1)
    uses = (
        final_caption(line, whole, epoch=0, rng=python_rng("longest caption", draw))
        for line in lines or [text]
        for draw in draws
    )
    return list(dict.fromkeys(uses))


def length_of_longest(measure: Measure) -> Callable[[str, CaptionRules], CaptionLength]:
    """A function of text and rules; texts and rules that come again, such as class tokens, are measured once."""

    @cache
    def longest(text: str, rules: CaptionRules) -> CaptionLength:
        return max((measure(use) for use in longest_uses(text, rules)), key=lambda length: length.tokens)

    return longest
