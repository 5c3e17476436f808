"""Choices in prompts: ``{a|b}`` is one of its variants, drawn for each image, or each of them in turn.

    {cat|dog}               one of them
    {2$$red|green|blue}     two of them, joined by ", "
    {1-2$$ and $$a|b|c}     one or two of them, joined by " and "
    {e$$a|b|c}              an image for each; {e$$2$$...} for each pair, in the order of the variants

Groups nest, and the inner ones are drawn first. ``\\{`` and ``\\}`` are braces themselves. This module does not import
torch.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
from dataclasses import dataclass

from library.errors import UserError

logger = logging.getLogger(__name__)

#: most lines that one line may stand for
MAX_LINES = 10_000

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_COUNT = re.compile(r"(\d+)(?:-(\d+))?")
#: stand for braces that are text, while groups are looked for
_TEXT_BRACES = {"{": "\ue000", "}": "\ue001"}


@dataclass(frozen=True)
class _Group:
    start: int
    end: int
    variants: tuple[str, ...]
    counts: tuple[int, int] = (1, 1)  # fewest and most variants that are taken
    separator: str = ", "
    enumerates: bool = False

    def drawn(self, rng: random.Random) -> str:
        count = rng.randint(*self.counts) if self.counts[0] < self.counts[1] else self.counts[0]
        return self.separator.join(rng.sample(self.variants, count))

    def all(self) -> list[str]:
        sizes = range(self.counts[0], self.counts[1] + 1)
        return [self.separator.join(chosen) for n in sizes for chosen in itertools.combinations(self.variants, n)]


def is_dynamic(line: str) -> bool:
    """Whether a line has a group of choices."""
    return bool(_innermost(_protected(line))[1])


def enumerates(line: str) -> bool:
    """Whether a line stands for one image for each of its choices, however many are asked for."""
    return re.search(r"\{[eE]\$\$", _protected(line)) is not None


def expanded(line: str, seed: int) -> list[str]:
    """Return the lines that a line stands for with an image of this seed; several only if it enumerates.

    Raises:
        UserError: there are more than ``MAX_LINES``.
    """
    return [_plain(text) for text in _expanded(_protected(line), seed)]


def _expanded(text: str, seed: int, depth: int = 0) -> list[str]:
    text, groups = _innermost(text)
    if not groups:
        return [text]
    listed = [group for group in groups if group.enumerates]
    if not listed:
        # each depth draws by itself: with the same numbers, {a|{b|c}} could never become b
        rng = random.Random(f"{seed} {depth}" if depth else seed)
        for group in reversed(groups):
            text = text[: group.start] + group.drawn(rng) + text[group.end :]
        return _expanded(text, seed, depth + 1)
    found: list[str] = []
    for choice in itertools.product(*(group.all() for group in listed)):
        one = text
        for group, chosen in zip(reversed(listed), reversed(choice), strict=True):
            one = one[: group.start] + chosen + one[group.end :]
        found += _expanded(one, seed, depth + 1)
        if len(found) > MAX_LINES:
            raise UserError(f"a prompt with {{e$$...}} stands for more than {MAX_LINES} images; give fewer choices")
    return found


def _innermost(text: str) -> tuple[str, list[_Group]]:
    """The groups without groups in them; braces that are no group become text."""
    while True:
        groups, plain = [], None
        for match in _INNERMOST.finditer(text):
            group = _read(match)
            if group is None:
                plain = match
                break
            groups.append(group)
        if plain is None:
            return text, groups
        inner = _TEXT_BRACES["{"] + plain[1] + _TEXT_BRACES["}"]
        text = text[: plain.start()] + inner + text[plain.end() :]


def _read(match: re.Match[str]) -> _Group | None:
    *settings, choices = match[1].split("$$")
    variants = tuple(choices.split("|"))
    if not variants[0]:
        return None
    enumerated = bool(settings) and settings[0].lower() == "e"
    settings = settings[1:] if enumerated else settings
    counts, separator = (1, 1), ", "
    if settings and (found := _COUNT.match(settings[0])):
        if found[0] != settings[0]:
            logger.warning('"%s" in a prompt is no count such as 2 or 1-3; 1 is used', settings[0])
        else:
            low, high = sorted((int(found[1]), int(found[2] or found[1])))
            counts = min(low, len(variants)), min(high, len(variants))
        settings = settings[1:]
    elif settings and not settings[0]:
        settings = settings[1:]  # {$$ and $$a|b}: no count
    if settings:
        separator = "$$".join(settings)
    return _Group(match.start(), match.end(), variants, counts, separator, enumerated)


def _protected(line: str) -> str:
    for brace, stand_in in _TEXT_BRACES.items():
        line = line.replace(f"\\{brace}", stand_in)
    return line


def _plain(text: str) -> str:
    for brace, stand_in in _TEXT_BRACES.items():
        text = text.replace(stand_in, brace)
    return text
