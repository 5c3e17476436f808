"""Published names that graphical programs and notebooks import: ``read_config_from_file`` and ``BucketManager``.

This module, ``flux_train_utils`` and ``huggingface_util`` beside it exist for such programs alone. They keep the
predecessor's names and arguments over what this project does elsewhere; nothing in the project imports them.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from library.config.config_file import read_args
from library.data.augment import in_the_middle
from library.data.buckets import BucketRules, Buckets, Size, make_sizes


def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line over the file that ``args.config_file`` names; ``args`` if it names none."""
    if not args.config_file:
        return args
    words = sys.argv[1:]
    if not any(word.partition("=")[0] == "--config_file" for word in words):
        words = [*words, "--config_file", str(args.config_file)]
    return read_args(parser, words)


class BucketManager:
    """Assigns images to buckets by their sizes, as training does. All sizes are (width, height), pixels."""

    def __init__(
        self, no_upscale: bool, max_reso: Size | None, min_size: int, max_size: int | None, reso_steps: int
    ) -> None:
        self.no_upscale = no_upscale
        self.max_reso = max_reso
        self.max_area = max_reso[0] * max_reso[1] if max_reso is not None else None
        self.min_size, self.max_size, self.reso_steps = min_size, max_size, reso_steps
        self.resos: list[Size] = []
        self.reso_to_id: dict[Size, int] = {}
        self.buckets: list[list[Any]] = []
        self._predefined: Buckets | None = None

    @property
    def _rules(self) -> BucketRules:
        if self.max_reso is None:
            raise ValueError("BucketManager: without max_reso, call set_predefined_resos")
        longest = self.max_size if self.max_size is not None else self.max_area or 0
        return BucketRules(
            self.max_reso,
            enabled=True,
            min_side=self.min_size,
            max_side=longest,
            step=self.reso_steps,
            no_upscale=self.no_upscale,
        )

    def make_buckets(self) -> None:
        """Make all sizes from the resolution."""
        self.set_predefined_resos(make_sizes(self._rules))

    def set_predefined_resos(self, resos: list[Size]) -> None:
        """Choose among these sizes."""
        self.predefined_resos = sorted(resos)
        self._predefined = Buckets.of_sizes(resos)

    def add_if_new_reso(self, reso: Size) -> None:
        """Make the bucket of a size, if there is none."""
        if reso not in self.reso_to_id:
            self.reso_to_id[reso] = len(self.resos)
            self.resos.append(reso)
            self.buckets.append([])

    def round_to_steps(self, x: float) -> int:
        """A length cut to a multiple of ``reso_steps``."""
        whole = int(x + 0.5)
        return whole - whole % self.reso_steps

    def select_bucket(self, image_width: int, image_height: int) -> tuple[Size, Size, float]:
        """The bucket of an image, the size it is resized to before the crop, and the error of the aspect ratio."""
        size = (image_width, image_height)
        buckets = self._predefined if self._predefined is not None and not self.no_upscale else Buckets(self._rules)
        reso = buckets.assign(size)
        self.add_if_new_reso(reso)
        return reso, in_the_middle(size, reso).resized, reso[0] / reso[1] - image_width / image_height

    def add_image(self, reso: Size, image_or_info: Any) -> None:
        """Put an image, or an object that represents it, into the bucket of a size."""
        self.add_if_new_reso(reso)
        self.buckets[self.reso_to_id[reso]].append(image_or_info)

    def shuffle(self) -> None:
        """Shuffle the images of each bucket."""
        for bucket in self.buckets:
            random.shuffle(bucket)  # the order of a program that imports this, not of a run

    def sort(self) -> None:
        """Order the buckets by size."""
        pairs = sorted(zip(self.resos, self.buckets, strict=True), key=lambda pair: pair[0])
        self.resos = [reso for reso, _ in pairs]
        self.buckets = [bucket for _, bucket in pairs]
        self.reso_to_id = {reso: index for index, reso in enumerate(self.resos)}
