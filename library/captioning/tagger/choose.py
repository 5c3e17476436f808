"""Choose the tags of an image by a tagger's probabilities: thresholds, names, order. Functions alone, no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from library.captioning.tagger.labels import Label
from library.errors import UserError

#: names of up to this many characters keep their underscores: ^_^, 0_0
_SHORT = 3


@dataclass(frozen=True)
class Names:
    """The spelling of tags: underscores, then replacements, then expansion."""

    remove_underscore: bool = False
    replacements: Mapping[str, str] = field(default_factory=dict)
    expand_characters: bool = False

    def of(self, label: Label) -> tuple[str, ...]:
        """Return the tag or tags that a label becomes."""
        name = label.name
        if self.remove_underscore:
            name = without_underscores(name)
        if (new := self.replacements.get(name, self.replacements.get(label.name))) is not None:
            return (new,)
        if self.expand_characters and label.category == "character":
            return expanded(name)
        return (name,)


def without_underscores(name: str) -> str:
    """Return the name with spaces; emoticons of three characters stay."""
    return name.replace("_", " ") if len(name) > _SHORT else name


def expanded(name: str) -> tuple[str, ...]:
    """Return a character and the series in the last parentheses of its name; one tag if there is none.

    saber_(alter)_(fate) is saber_(alter) and fate.
    """
    match = re.fullmatch(r"(.*[^\s_(].*?)[\s_]*\(([^()]*\w[^()]*)\)", name)
    return (match[1].rstrip("_ "), match[2]) if match else (name,)


def parse_replacements(text: str | None) -> dict[str, str]:
    r"""Return the pairs of ``from,to;from,to``, where ``\,`` and ``\;`` are the characters themselves.

    Raises:
        UserError: a pair that has not two parts.
    """
    found = {}
    for pair in re.split(r"(?<!\\);", text or ""):
        if not pair.strip():
            continue
        parts = [re.sub(r"\\([,;])", r"\1", part).strip() for part in re.split(r"(?<!\\),", pair)]
        if len(parts) != 2 or not all(parts):
            raise UserError(f'--tag_replacement {text}: "{pair}" must be two tags, as in "from,to;from,to"')
        found[parts[0]] = parts[1]
    return found


def parse_tags(text: str | None, separator: str) -> list[str]:
    """Return the tags of a list, without spaces around them."""
    return [tag.strip() for tag in (text or "").split(separator.strip()) if tag.strip()]


@dataclass(frozen=True)
class Rules:
    """The choice of tags and their order.

    Args:
        thresholds: category -> least probability; 1 or more chooses none. Ratings and quality have none.
        ratings, quality: the place of the likeliest of each: "first", "last", or "" for none.
        always_first: tags that are moved to the front, one after the other, so that the last named is the first.
        least: probability below which nothing counts, ratings and quality neither.
        by_probability: the likeliest tag first; otherwise general tags, then characters, in the model's order.
    """

    names: Names
    thresholds: Mapping[str, float]
    undesired: frozenset[str] = frozenset()
    always_first: Sequence[str] = ()
    characters_first: bool = False
    ratings: str = ""
    quality: str = ""
    least: float = 0.0
    by_probability: bool = False


#: categories in their order, where tags are not sorted by probability
_ORDER = ("general", "character", "copyright", "artist", "meta", "model")


@dataclass(frozen=True)
class Chosen:
    """The tags of an image, and by category what was chosen, with its probability."""

    tags: tuple[str, ...]
    by_category: Mapping[str, Sequence[tuple[str, float]]]


def choose(labels: Sequence[Label], probabilities: Sequence[float], rules: Rules) -> Chosen:
    """Return the tags of an image.

    Args:
        probabilities: of each label, 0 to 1.
    """
    by_category: dict[str, list[tuple[Label, float]]] = {}
    for label, probability in zip(labels, probabilities, strict=True):
        if probability >= rules.least:
            by_category.setdefault(label.category, []).append((label, float(probability)))
    kept = [
        (label, probability)
        for category in _ORDER
        for label, probability in by_category.get(category, ())
        if probability >= rules.thresholds[category] and rules.thresholds[category] < 1
    ]
    tags = _ordered(kept, rules)
    for category, place in (("quality", rules.quality), ("rating", rules.ratings)):
        if place and by_category.get(category):
            best = max(by_category[category], key=lambda pair: pair[1])
            kept.append(best)
            names = list(rules.names.of(best[0]))
            tags = names + tags if place == "first" else tags + names
    tags = [tag for tag in dict.fromkeys(tags) if tag not in rules.undesired]
    for tag in rules.always_first:
        if tag in tags:
            tags.remove(tag)
            tags.insert(0, tag)
    shown: dict[str, list[tuple[str, float]]] = {}
    for label, probability in kept:
        shown.setdefault(label.category, []).append((", ".join(rules.names.of(label)), probability))
    return Chosen(tuple(tags), shown)


def _ordered(kept: Sequence[tuple[Label, float]], rules: Rules) -> list[str]:
    if rules.by_probability:
        kept = sorted(kept, key=lambda pair: -pair[1])
    named = [(label.category == "character", rules.names.of(label)) for label, _ in kept]
    characters = [names for is_character, names in named if is_character]
    if not rules.characters_first:
        groups = [names for _, names in named]
    else:
        # published: without probabilities, each goes to the front in turn, so that the last is the first
        front = characters if rules.by_probability else characters[::-1]
        groups = front + [names for is_character, names in named if not is_character]
    return [name for names in groups for name in names]
