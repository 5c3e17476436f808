"""Rules that tidy tags and captions, as a table of pure functions, each with examples that the tests run.

Tags are lists. A rule looks at all of an image's tags, as what one says may be said better by another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Tags = Sequence[str]


@dataclass(frozen=True)
class TagRule:
    """One rule for tags: what it does, and (before, after) as texts."""

    does: str
    apply: Callable[[Tags], list[str]]
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CaptionRule:
    """One rule for captions: words and what stands for them; whole words alone, again until nothing changes."""

    old: str
    new: str

    def apply(self, caption: str) -> str:
        pattern = re.compile(rf"\b{re.escape(self.old)}\b" if self.old[-1:].isalpha() else rf"\b{re.escape(self.old)}")
        while (changed := pattern.sub(self.new, caption)) != caption:
            caption = changed
        return caption


# ---- tags ----

#: characters of tags that are emoticons and keep their underscore, such as ^_^ and >_<
_EMOTICON = 3

_SEVERAL = re.compile(r"(?:\d+\+?|multiple) ?(?:girls|boys)|girls|boys")
_LENGTH = re.compile(r"(?:long|short|medium) hair")
_COLOR = re.compile(r"\w+ hair")
#: of several people, tags of which it is unclear whose they are
_GROUPS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:long|short|medium) hair",
        r"(?:bob|hime) cut",
        r"\w+ eyes",
        r"\w+ sleeves|sleeveless",
        r"ponytail|braid|ahoge|twintails|\w+ bun|single (?:hair|side) bun|two side up|two tails|\w+ braid|sidelocks",
    )
)
#: tags of two words that are treated as one
_AS_ONE_WORD = ("hair ornament",)


def split(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def without_underscores(tags: Tags) -> list[str]:
    return [tag if len(tag) <= _EMOTICON and not tag.isalnum() else tag.replace("_", " ") for tag in tags]


def without_rating(tags: Tags) -> list[str]:
    for place, tag in enumerate(tags):
        if place and tag.startswith("rating"):
            return list(tags[:place])
    return list(tags)


def without_ambiguous(tags: Tags) -> list[str]:
    """Drop each group of which there are several tags, of several people."""
    if not _has_several_people(tags):
        return list(tags)
    for group in _GROUPS:
        if sum(group.fullmatch(tag) is not None for tag in tags) > 1:
            tags = [tag for tag in tags if not group.fullmatch(tag)]
    return list(tags)


def without_hair_colors(tags: Tags) -> list[str]:
    """Drop colours of hair of which there are several, of several people; the length of hair stays."""
    colors = [tag for tag in tags if _COLOR.fullmatch(tag) and not _LENGTH.fullmatch(tag)]
    if not _has_several_people(tags) or len(colors) < 2:
        return list(tags)
    return [tag for tag in tags if tag not in colors]


def without_general(tags: Tags) -> list[str]:
    """Drop a word that another tag says with more words: shirt beside white shirt."""
    return [tag for tag in tags if not ((_is_one_word(tag)) and any(_says_more(other, tag) for other in tags))]


def _has_several_people(tags: Tags) -> bool:
    return any(_SEVERAL.fullmatch(tag) for tag in tags)


def _is_one_word(tag: str) -> bool:
    return tag in _AS_ONE_WORD or re.fullmatch(r"\w+", tag) is not None


def _says_more(other: str, tag: str) -> bool:
    return re.fullmatch(rf"(?:\w+ )+{re.escape(tag)}", other) is not None


TAG_RULES = (
    TagRule(
        "spaces instead of underscores; emoticons stay",
        without_underscores,
        (("long_hair, ^_^, >_<", "long hair, ^_^, >_<"), ("0_0, looking_at_viewer", "0_0, looking at viewer")),
    ),
    TagRule(
        "nothing from a rating on; one at the beginning stays",
        without_rating,
        (("1girl, smile, rating:safe, hat", "1girl, smile"), ("rating:safe, 1girl", "rating:safe, 1girl")),
    ),
    TagRule(
        "of several people, no group of looks of which there are several",
        without_ambiguous,
        (
            ("2girls, long hair, short hair, smile", "2girls, smile"),
            ("2girls, blue eyes, red eyes, long hair", "2girls, long hair"),
            ("1girl, long hair, short hair", "1girl, long hair, short hair"),
            ("multiple boys, long sleeves, sleeveless, bob cut", "multiple boys, bob cut"),
            ("girls und panzer, 1girl, red eyes, blue eyes", "girls und panzer, 1girl, red eyes, blue eyes"),
        ),
    ),
    TagRule(
        "of several people, no colours of hair of which there are several; its length stays",
        without_hair_colors,
        (
            ("2girls, blonde hair, black hair, long hair", "2girls, long hair"),
            ("2girls, blonde hair, long hair", "2girls, blonde hair, long hair"),
        ),
    ),
    TagRule(
        "no word that another tag says with more words",
        without_general,
        (
            ("shirt, white shirt", "white shirt"),
            ("girl, blue-eyed girl", "girl, blue-eyed girl"),
            ("shirt, shirt", "shirt, shirt"),
            ("hair ornament, flower hair ornament", "flower hair ornament"),
        ),
    ),
)


def clean_tags(text: str) -> str:
    """Return tags after all rules."""
    tags = split(text)
    for rule in TAG_RULES:
        tags = rule.apply(tags)
    return ", ".join(tags)


# ---- captions ----

CAPTION_RULES = (
    CaptionRule("anime anime", "anime"),
    CaptionRule("young ", ""),
    CaptionRule("anime girl", "girl"),
    *(CaptionRule(f"cartoon {word}", "girl") for word in ("female", "lady", "character", "woman")),
    CaptionRule("cartoon women", "girls"),
    CaptionRule("cartoon girl", "girl"),
    *(CaptionRule(f"anime {word}", "girl") for word in ("female", "lady", "character", "woman")),
    CaptionRule("anime women", "girls"),
    *(CaptionRule(word, "girl") for word in ("lady", "female", "woman")),
    *(CaptionRule(word, "girls") for word in ("women", "people")),
    CaptionRule("person", "girl"),
    CaptionRule("a cartoon figure", "a figure"),
    CaptionRule("a cartoon image", "an image"),
    CaptionRule("a cartoon picture", "a picture"),
    CaptionRule("an anime cartoon image", "an image"),
    CaptionRule("a cartoon anime drawing", "a drawing"),
    CaptionRule("a cartoon drawing", "a drawing"),
    CaptionRule("girl girl", "girl"),
    CaptionRule("an girl", "a girl"),
)

#: (before, after all rules)
CAPTION_EXAMPLES = (
    ("an anime anime girl with a hat", "a girl with a hat"),
    ("a young woman and a lady", "a girl and a girl"),
    ("two cartoon women, many people", "two girls, many girls"),
    ("a cartoon image of a person", "an image of a girl"),
    ("a cartoon anime drawing of an anime cartoon character", "a drawing of an anime girl"),
    ("a womanly personality among females", "a womanly personality among females"),
)


def clean_caption(text: str) -> str:
    """Return a caption after all rules."""
    for rule in CAPTION_RULES:
        text = rule.apply(text)
    return text
