"""From the text of a caption file to the caption of one use: a function of text, rules, epoch and a generator.

The order is the published one: whole-caption dropout; choice of a line; prefix and suffix; wildcards (those of
prefix and suffix too); the part kept in its place; shuffling; tag dropout; the secondary separator.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionRules:
    """A subset's caption settings; see ``docs/train_network.md`` for what each does."""

    prefix: str | None = None
    suffix: str | None = None
    separator: str = ","
    secondary_separator: str | None = None
    shuffle: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    wildcards: bool = False
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0

    @property
    def is_random(self) -> bool:
        """Whether two uses of one image may have different captions."""
        return bool(
            self.shuffle
            or self.wildcards
            or self.dropout_rate > 0
            or self.dropout_every_n_epochs > 0
            or self.tag_dropout_rate > 0
        )


def final_caption(text: str, rules: CaptionRules, *, epoch: int, rng: random.Random) -> str:
    """The caption of one use.

    Args:
        text: of the caption file, or class tokens; several lines are alternatives with wildcards, and
            otherwise only the first counts.
        epoch: counted from 0; with ``dropout_every_n_epochs`` n, every n-th epoch (the n-th is the first of them)
            has no captions.
        rng: keyed by the visit.
    """
    every = rules.dropout_every_n_epochs
    if rules.dropout_rate > 0 and rng.random() < rules.dropout_rate:
        return ""
    if every > 0 and (epoch + 1) % every == 0:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    # the line first, so that every line gets prefix and suffix
    caption = rng.choice(lines) if rules.wildcards else lines[0]
    if rules.prefix:
        caption = f"{rules.prefix} {caption}"
    if rules.suffix:
        caption = f"{caption} {rules.suffix}"
    if rules.wildcards:
        caption = expand_wildcards(caption, rng)
    if rules.shuffle or rules.tag_dropout_rate > 0:
        caption = _arrange_tags(caption, rules, rng)
    elif rules.keep_tokens_separator:
        # the mark itself is never part of the caption
        caption = _join(_split(caption.replace(rules.keep_tokens_separator, rules.separator), rules.separator))
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.separator)
    return caption


def _split(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.strip().split(separator) if tag.strip()]


def _join(tags: list[str]) -> str:
    return ", ".join(tags)


def _arrange_tags(caption: str, rules: CaptionRules, rng: random.Random) -> str:
    """Shuffle and drop tags between the kept front and, after a second mark, the kept end."""
    mark = rules.keep_tokens_separator
    front: list[str] = []
    end: list[str] = []
    if mark and mark in caption:
        parts = caption.split(mark)
        front = _split(parts[0], rules.separator)
        tags = _split(parts[1], rules.separator)
        end = _split(rules.separator.join(parts[2:]), rules.separator)
    else:
        tags = _split(caption, rules.separator)
        front, tags = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    if rules.shuffle:
        rng.shuffle(tags)
    if rules.tag_dropout_rate > 0:
        tags = [tag for tag in tags if rng.random() >= rules.tag_dropout_rate]
    return _join(front + tags + end)


_INNERMOST = re.compile(r"\{([^{}]*)\}")
# stand-ins from the private use area, so that escaped braces are not read as wildcards
_OPEN, _CLOSE = "\ue000", "\ue001"


def expand_wildcards(text: str, rng: random.Random) -> str:
    """``{a|b}`` becomes one of its parts, innermost first; ``{{`` and ``}}`` are plain braces."""
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    while found := _INNERMOST.search(text):
        text = text[: found.start()] + rng.choice(found.group(1).split("|")) + text[found.end() :]
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")
