"""Find settings that can have no effect: by the other settings, when the dataset file is read, and by the images.

``library.data.idle_options`` checks flags of the command line.
They cause warnings and never errors, because a dataset file is often made from another one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.data.captions import movable_tags
from library.data.image_io import has_alpha

if TYPE_CHECKING:
    from library.data.dataset_spec import SubsetSpec
    from library.data.records import ImageRecord

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]


# ---- by other settings ----


@dataclass(frozen=True)
class _Rule:
    """Keys that do nothing where ``works`` is false for a subset's values."""

    keys: tuple[str, ...]
    works: Callable[[Values], bool]
    reason: str  # continues after "has no effect"
    switch: str | None = None  # key that, if it is written out, shows that this is intended


def _arranges_tags(v: Values) -> bool:
    return v["shuffle_caption"] or v["caption_tag_dropout_rate"] > 0 or v["token_warmup_step"] > 0


_ABOUT_CAPTIONS = (
    "shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "caption_prefix",
    "caption_suffix", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step",
    "caption_dropout_every_n_epochs",
)  # fmt: skip

_RULES = (
    _Rule(
        ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
        lambda v: v["enable_bucket"],
        "without enable_bucket",
        switch="enable_bucket",
    ),
    _Rule(
        ("min_bucket_reso", "max_bucket_reso"),
        lambda v: not (v["enable_bucket"] and v["bucket_no_upscale"]),
        "with bucket_no_upscale, which makes buckets from the images' own sizes",
    ),
    _Rule(("keep_tokens",), _arranges_tags, "without shuffle_caption, caption_tag_dropout_rate or token_warmup_step"),
    _Rule(
        ("caption_separator",),
        lambda v: _arranges_tags(v) or v["keep_tokens_separator"] or v["secondary_separator"] or v["metadata_file"],
        "where tags are neither shuffled, dropped nor joined",
    ),
    _Rule(("validation_seed",), lambda v: v["validation_split"] > 0, "without validation_split"),
    _Rule(("token_warmup_min",), lambda v: v["token_warmup_step"] > 0, "without token_warmup_step"),
    _Rule(_ABOUT_CAPTIONS, lambda v: v["caption_dropout_rate"] < 1, "with caption_dropout_rate 1: no caption is used"),
)

#: values by which a key asks for nothing
_ASKS_FOR_NOTHING: dict[str, Any] = {"token_warmup_min": 1, "caption_separator": ","}


@dataclass(frozen=True)
class Place:
    """A table of the dataset file and its keys."""

    name: str  # "data.toml: [general]"
    values: Values


class Unused:
    """Collects the origin of each setting and whether any subset uses it.

    A key of ``[general]`` that serves one subset of several is no mistake, so only keys that serve none are named.
    """

    def __init__(self) -> None:
        self._works: dict[tuple[str, str, str], bool] = defaultdict(bool)  # (place, reason, key)

    def note(self, values: Values, places: Sequence[Place]) -> None:
        """Add one subset.

        Args:
            values: of all keys, as they hold for the subset.
            places: the nearest first.
        """
        for rule in _RULES:
            works = bool(rule.works(values)) or any(rule.switch in place.values for place in places)
            for key in rule.keys:
                given = next((place for place in places if key in place.values), None)
                # false, 0, "" and the like turn a setting off
                if given is not None and values[key] and values[key] != _ASKS_FOR_NOTHING.get(key):
                    self._works[given.name, rule.reason, key] |= works

    def warnings(self) -> list[str]:
        """Return a line for each place and reason."""
        keys: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (place, reason, key), works in self._works.items():
            if not works:
                keys[place, reason].append(key)
        lines = []
        for (place, reason), names in keys.items():
            verb = "has" if len(names) == 1 else "have"
            lines.append(f"{place}: {', '.join(names)} {verb} no effect {reason}")
        return lines


# ---- by the images ----


def warn_of_no_effect(subset: SubsetSpec, records: Sequence[ImageRecord]) -> None:
    """Warn of settings of a subset that act on none of its images or captions."""
    for line in without_effect(subset, records):
        logger.warning("%s: %s", subset.where, line)


def without_effect(subset: SubsetSpec, records: Sequence[ImageRecord]) -> list[str]:
    """Yield the warnings of ``warn_of_no_effect``; each search ends at the first image that a setting acts on."""
    if not records:
        return []
    rules = subset.captions
    found = []
    if subset.alpha_mask and not any(has_alpha(record.path) for record in records):
        found.append("alpha_mask has no effect: none of the images has an alpha channel")

    def most_tags(above: int) -> bool:
        return any(movable_tags(record.caption, rules) > above for record in records)

    kept = f" after the {rules.keep_tokens} that keep_tokens keeps" if rules.keep_tokens else ""
    if rules.shuffle and not most_tags(1):
        found.append(f'shuffle_caption has no effect: no caption has two tags{kept} (split at "{rules.separator}")')
    if rules.tag_dropout_rate > 0 and not most_tags(0):
        found.append(f"caption_tag_dropout_rate has no effect: no caption has a tag{kept}")
    if rules.warmup_step > 0 and not most_tags(rules.warmup_min):
        found.append(f"token_warmup_step has no effect: no caption has more than {rules.warmup_min} tags{kept}")
    around = f"{rules.prefix or ''}{rules.suffix or ''}"
    if rules.wildcards and not any("{" in around + r.caption or "\n" in r.caption for r in records):
        found.append("enable_wildcard has no effect: no caption has a choice in braces or several lines")
    for name, mark in (
        ("keep_tokens_separator", rules.keep_tokens_separator),
        ("secondary_separator", rules.secondary_separator),
    ):
        if mark and not any(mark in around + record.caption for record in records):
            found.append(f'{name} has no effect: no caption has "{mark}" in it')
    return found
