"""Aspect ratio buckets: their sizes, and the bucket of each image. All sizes are (W, H) pixels."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

Size = tuple[int, int]

#: longest side of a resolution, pixels
MAX_SIDE = 65_536
#: most bucket sizes; more come from bounds far apart with a tiny step
MAX_SIZES = 50_000

#: tolerance for whole numbers that come out a little too small, pixels
_ROUNDING = 1e-6


@dataclass(frozen=True)
class BucketRules:
    """A dataset's bucket settings, pixels."""

    resolution: Size
    enabled: bool = False
    min_side: int = 256
    max_side: int = 1024
    step: int = 64
    no_upscale: bool = False

    @property
    def sides(self) -> range:
        """Return every length of a bucket's side: multiples of ``step`` within the two bounds."""
        return range(_up(self.min_side, self.step), self.max_side + 1, self.step)


class Buckets:
    """The sizes of one dataset."""

    def __init__(self, rules: BucketRules) -> None:
        self._rules = rules
        self._use(make_sizes(rules) if rules.enabled and not rules.no_upscale else [])

    @classmethod
    def of_sizes(cls, sizes: Iterable[Size]) -> Buckets:
        """Return buckets of a given list of sizes."""
        made = cls(BucketRules((1, 1)))
        made._rules = BucketRules((1, 1), enabled=True)
        made._use(sorted(set(sizes), key=lambda s: (s[0] / s[1], s[0])))
        return made

    def _use(self, sizes: list[Size]) -> None:
        self._sizes = sizes
        self._ratios = [width / height for width, height in sizes]

    def assign(self, size: Size) -> Size:
        """Return the bucket of an image: the nearest aspect ratio, or without buckets the resolution."""
        rules = self._rules
        if not rules.enabled:
            return rules.resolution
        if rules.no_upscale:
            return own_size(size, rules)
        ratio = size[0] / size[1]
        after = bisect.bisect_left(self._ratios, ratio)
        near = self._sizes[max(0, after - 1) : after + 1]
        # of two equally near, the larger
        return min(near, key=lambda s: (abs(s[0] / s[1] - ratio), -s[0] * s[1]))


def make_sizes(rules: BucketRules) -> list[Size]:
    """Return sizes in multiples of ``step`` whose area does not exceed the resolution's, one for each aspect ratio.

    Each width has the tallest height that fits, and the same rotated; sorted by aspect ratio.
    """
    area = rules.resolution[0] * rules.resolution[1]
    sizes = set()
    shortest = rules.sides[0] if rules.sides else 0
    for width in _widths(rules):
        # the square too, which is not the tallest of its width if the resolution is not a multiple of the step
        if width * width <= area:
            sizes.add((width, width))
        # not by trying all: bounds far apart with a small step make tens of thousands of sides
        height = min(rules.sides[-1], area // width // rules.step * rules.step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    by_ratio: dict[float, Size] = {}
    for size in sorted(sizes, key=lambda s: s[0] * s[1]):
        by_ratio[size[0] / size[1]] = size  # the larger of one ratio stays
    return [by_ratio[ratio] for ratio in sorted(by_ratio)]


def _widths(rules: BucketRules) -> range:
    """Return the sides that fit into the area beside the shortest one, whatever the upper bound."""
    shortest = _up(rules.min_side, rules.step)
    longest = min(rules.max_side, rules.resolution[0] * rules.resolution[1] // shortest)
    return range(shortest, longest + 1, rules.step)


def size_count(rules: BucketRules) -> int:
    """Estimate the number of sizes of ``make_sizes``, without making them: two for every width."""
    return 2 * len(_widths(rules))


def own_size(size: Size, rules: BucketRules) -> Size:
    """Return the bucket without upscaling: the image's size, shrunk to the resolution's area, cut to multiples of
    ``step``.

    Only a side shorter than ``step`` is enlarged, because nothing smaller can be trained on; the other is then cut
    where the area would be exceeded.
    """
    width, height = size
    area, step = rules.resolution[0] * rules.resolution[1], rules.step
    if width * height > area:
        width, height = _shrunk(size, area, step)
    longest = max(step, area // step // step * step)  # beside a side of ``step``
    if min(width, height) < step:
        width, height = min(width, longest), min(height, longest)
    return max(step, width // step * step), max(step, height // step * step)


def _shrunk(size: Size, area: int, step: int) -> Size:
    """Return the size for an image larger than ``area``: one side as long as fits, the other from the aspect ratio.

    Cutting both sides to the step by themselves may cut one by almost a whole step and the other by nothing. So each
    side in turn is cut first and the other follows from it; of the two results the nearer aspect ratio is taken.
    """
    ratio = size[0] / size[1]
    width = (area * ratio) ** 0.5
    height = width / ratio
    wide, high = _down(width, step), _down(height, step)
    found = [(wide, _down(wide / ratio, step)), (_down(high * ratio, step), high)]
    found = [s for s in found if min(s) >= step]
    if not found:
        return int(width + _ROUNDING), int(height + _ROUNDING)
    return min(found, key=lambda s: (abs(s[0] / s[1] - ratio), -s[0] * s[1]))


def _down(length: float, step: int) -> int:
    return int(length + _ROUNDING) // step * step


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def mean_aspect_error(pairs: list[tuple[Size, Size]]) -> float:
    """Return the mean absolute difference between images' and their buckets' aspect ratios, for the metadata."""
    if not pairs:
        return 0.0
    return sum(abs(size[0] / size[1] - bucket[0] / bucket[1]) for size, bucket in pairs) / len(pairs)
