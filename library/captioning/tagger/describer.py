"""A tagger with the rules that make a caption of what it finds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from library.captioning.describing import Loaded
from library.captioning.tagger.choose import Rules, choose
from library.captioning.tagger.model import Tagger, square

logger = logging.getLogger(__name__)


class TagDescriber:
    """Describes images by tags.

    Args:
        counts: counts each tag of each image.
        by_category: print what was found by category, with probabilities.
    """

    def __init__(
        self, tagger: Tagger, rules: Rules, separator: str, counts: Counter[str], *, by_category: bool
    ) -> None:
        self._tagger, self._rules, self._separator = tagger, rules, separator
        self._counts = counts
        self._by_category = by_category
        known = {label.name for label in tagger.labels} | {
            name for label in tagger.labels for name in rules.names.of(label)
        }
        if unknown := [name for name in rules.names.replacements if name not in known | _spaced(known)]:
            logger.warning("--tag_replacement: the tagger has no tag named %s", ", ".join(unknown))

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return square(pixels, self._tagger.side)

    def describe(self, images: Sequence[Loaded[np.ndarray]]) -> Sequence[str]:
        found = self._tagger(np.stack([image.prepared for image in images]))  # (B, labels)
        texts = []
        for image, probabilities in zip(images, found, strict=True):
            chosen = choose(self._tagger.labels, probabilities, self._rules)
            self._counts.update(chosen.tags)
            texts.append(self._separator.join(chosen.tags))
            if self._by_category:
                print(f"{image.path}:")
                for category, tags in chosen.by_category.items():
                    print(f"  {category}: {', '.join(f'{tag} {share:.2f}' for tag, share in tags)}")
        return texts


def _spaced(names: set[str]) -> set[str]:
    return {name.replace("_", " ") for name in names}
