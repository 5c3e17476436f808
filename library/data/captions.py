"""Make the caption of one use from the text of a caption file: a function of text, rules, progress and a generator.

The order is the published one: whole-caption dropout; choice of a line; prefix and suffix; wildcards (those of
prefix and suffix too); the part kept in its place; tag warm-up; shuffling; tag dropout; the secondary separator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


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
    warmup_min: int = 1  # tags at the first step of the warm-up
    warmup_step: float = 0  # steps until all tags are used; below 1, a fraction of the run; 0 for none
    templates: tuple[str, ...] = ()  # whole captions, one of which replaces the image's own in each use

    @property
    def is_written_anew(self) -> bool:
        """Whether two captions of one image, neither dropped, may differ at the same step."""
        return self.shuffle or self.wildcards or self.tag_dropout_rate > 0 or len(self.templates) > 1

    @property
    def drops(self) -> bool:
        """Whether captions may be dropped as a whole."""
        return self.dropout_rate > 0 or self.dropout_every_n_epochs > 0


@dataclass(frozen=True)
class Progress:
    """The progress of a run when a caption is used."""

    step: int  # optimizer steps done before, from 0
    total_steps: int  # of the run


def final_caption(
    text: str, rules: CaptionRules, *, epoch: int, rng: random.Random, progress: Progress | None = None
) -> str:
    """Return the caption of one use.

    Args:
        text: of the caption file, or class tokens; several lines are alternatives with wildcards, and
            otherwise only the first counts.
        epoch: counted from 0; with ``dropout_every_n_epochs`` n, every n-th epoch (the n-th is the first of them)
            has no captions.
        rng: keyed by the visit.
        progress: for the tag warm-up; without it, the warm-up counts as over.
    """
    if is_dropped(rules, epoch=epoch, rng=rng):
        return ""
    return written_caption(text, rules, rng=rng, progress=progress)


def is_dropped(rules: CaptionRules, *, epoch: int, rng: random.Random) -> bool:
    """Whether this use drops its caption; arguments as in ``final_caption``."""
    if rules.dropout_rate > 0 and rng.random() < rules.dropout_rate:
        return True
    every = rules.dropout_every_n_epochs
    return every > 0 and (epoch + 1) % every == 0


def written_caption(text: str, rules: CaptionRules, *, rng: random.Random, progress: Progress | None = None) -> str:
    """Return the caption of a use that is not dropped; arguments as in ``final_caption``."""
    if rules.templates:
        return rng.choice(rules.templates)
    lines = _used_lines(text, rules)
    # the line first, so that every line gets prefix and suffix
    caption = rng.choice(lines) if rules.wildcards else lines[0]
    if rules.prefix:
        caption = f"{rules.prefix} {caption}"
    if rules.suffix:
        caption = f"{caption} {rules.suffix}"
    if rules.wildcards:
        caption = expand_wildcards(caption, rng)
    if rules.shuffle or rules.tag_dropout_rate > 0 or rules.warmup_step > 0:
        caption = _arrange_tags(caption, rules, rng, progress)
    elif rules.keep_tokens_separator and rules.keep_tokens_separator in caption:
        # the mark itself is never part of the caption
        tags = _split(caption.replace(rules.keep_tokens_separator, rules.separator), rules.separator)
        caption = _join(tags, rules.separator)
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.separator)
    return caption


def _split(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.strip().split(separator) if tag.strip()]


def _join(tags: list[str], separator: str) -> str:
    """Join tags with the separator and a space."""
    return (separator if separator[-1:].isspace() else f"{separator} ").join(tags)


def _arrange_tags(caption: str, rules: CaptionRules, rng: random.Random, progress: Progress | None) -> str:
    """Apply warm-up, shuffling and dropout to the tags between the kept front and, after a second mark, the kept
    end."""
    front, tags, end = _front_tags_end(caption, rules)
    if progress is not None:
        # before shuffling: tags are written in the order of importance, and a run learns them in that order
        tags = tags[: _warmed_up(len(tags), rules, progress)]
    if rules.shuffle:
        rng.shuffle(tags)
    if rules.tag_dropout_rate > 0:
        tags = [tag for tag in tags if rng.random() >= rules.tag_dropout_rate]
    return _join(front + tags + end, rules.separator)


def _front_tags_end(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    mark = rules.keep_tokens_separator
    if mark and mark in caption:
        parts = caption.split(mark)
        end = _split(rules.separator.join(parts[2:]), rules.separator)
        return _split(parts[0], rules.separator), _split(parts[1], rules.separator), end
    tags = _split(caption, rules.separator)
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []


def tags_of(text: str, rules: CaptionRules) -> list[str]:
    """Return the tags of a caption, split as in training; choices in braces stay as written."""
    lines = _used_lines(text, rules)
    for mark in filter(None, (rules.keep_tokens_separator, rules.secondary_separator)):
        lines = [line.replace(mark, rules.separator) for line in lines]
    return [tag for line in lines for tag in _split(line, rules.separator)]


def _used_lines(text: str, rules: CaptionRules) -> list[str]:
    """Return all non-empty lines with wildcards, otherwise the first of them."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines if rules.wildcards else lines[:1]


def movable_tags(text: str, rules: CaptionRules) -> int:
    """Return how many tags of a caption can be shuffled, dropped or held back; of several lines, the most."""
    whole = (f"{rules.prefix or ''} {line} {rules.suffix or ''}" for line in _used_lines(text, rules))
    return max(len(_front_tags_end(line, rules)[1]) for line in whole)


def _warmed_up(count: int, rules: CaptionRules, progress: Progress) -> int:
    """Return how many of ``count`` tags are used now: linear from ``warmup_min`` at step 0 to all at
    ``warmup_step``."""
    steps = rules.warmup_step if rules.warmup_step >= 1 else rules.warmup_step * progress.total_steps
    if progress.step >= steps or count <= rules.warmup_min:
        return count
    return rules.warmup_min + int(progress.step * (count - rules.warmup_min) / steps)


# ---- wildcards ----


@dataclass
class _Choice:
    """A choice between parts, during parsing and after; a part is a sequence of text and choices."""

    doubled: bool = False  # began with "{{"
    parts: list[list[str | _Choice]] = field(default_factory=lambda: [[]])


def expand_wildcards(text: str, rng: random.Random) -> str:
    """Replace ``{a|b}`` by one of its parts, which may hold further choices; ``{{`` and ``}}`` are plain braces.

    Adjacent braces are resolved by their partners: ``{a|{b|c}}`` is a choice in a choice, ``{a|{{b}}}`` one
    between a and {b}. Braces without a partner are plain text.
    """
    return _expand(_parse(text), rng) if "{" in text or "}" in text else text


def _expand(row: list[str | _Choice], rng: random.Random) -> str:
    return "".join(piece if isinstance(piece, str) else _expand(rng.choice(piece.parts), rng) for piece in row)


def _parse(text: str) -> list[str | _Choice]:
    """Parse the text into a sequence of plain pieces and choices."""
    whole = _Choice()
    open_ones = [whole]  # the whole text is the outermost open choice

    def add(piece: str | _Choice) -> None:
        open_ones[-1].parts[-1].append(piece)

    def close_as_text(ending: str) -> None:
        """Turn the innermost open braces, and their bars, back into plain text."""
        row = _as_text(open_ones.pop())
        for piece in (*row, ending):
            add(piece)

    place = 0
    while place < len(text):
        pair, inner = text[place : place + 2], open_ones[-1]
        length = 1
        if pair == "{{":
            open_ones.append(_Choice(doubled=True))
            length = 2
        elif pair[0] == "{":
            open_ones.append(_Choice())
        elif pair[0] == "|" and inner is not whole:
            inner.parts.append([])
        elif pair == "}}" and (inner is whole or inner.doubled):
            add("}") if inner is whole else close_as_text("}")
            length = 2
        elif pair == "}}" and len(open_ones) == 2:
            # only one choice is open, so that the two cannot both close something
            add("}")
            length = 2
        elif pair[0] == "}" and inner is not whole:
            open_ones.pop()
            if inner.doubled:
                # one brace closes, so "{{" were two choices: this is the inner one, and the outer continues
                inner.doubled = False
                open_ones.append(_Choice())
            add(inner)
        else:
            add(pair[0])
        place += length
    while len(open_ones) > 1:
        close_as_text("")
    return whole.parts[0]


def _as_text(opened: _Choice) -> list[str | _Choice]:
    row: list[str | _Choice] = ["{"]
    for index, part in enumerate(opened.parts):
        row += part if index == 0 else ["|", *part]
    return row
