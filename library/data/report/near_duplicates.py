"""Find equal or similar images: within one set, and between two sets that must not share any."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from library.data.records import ImageRecord
from library.data.report.looks import BITS, Look

#: bits by which the fingerprints of look-alikes may differ; unrelated photographs differ in about 60 of 128
DISTANCE = 10
#: difference, of 255, that a cell of the coarse images may have, and fraction of cells that may have more: a small mark
#: or a little more light is the same image, another object in the same place is not
CELL_DIFFERENCE, OTHER_CELLS = 48, 0.03

#: fingerprints up to which plain integers are faster than arrays
_FEW = 48
_BITS_OF_BYTE = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Pair:
    first: Path
    second: Path
    distance: int  # bits; -1 for files that are equal byte by byte

    @property
    def is_equal(self) -> bool:
        return self.distance < 0


def equal_files(looks: Iterable[Look]) -> list[list[Path]]:
    """Return groups of files with the same bytes."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for look in looks:
        groups[look.digest].append(look.path)
    return [paths for paths in groups.values() if len(paths) > 1]


def look_alikes(looks: Iterable[Look], distance: int = DISTANCE) -> list[list[Pair]]:
    """Return groups of similar images, as the pairs that connect each group; of equal files only one takes part."""
    different = list({look.digest: look for look in looks}.values())
    pairs = [Pair(a.path, b.path, bits) for a, b, bits in _close(different, distance)]
    return _grouped(pairs)


def on_both_sides(
    first: Iterable[ImageRecord],
    second: Iterable[ImageRecord],
    looks: Mapping[Path, Look],
    distance: int = DISTANCE,
) -> list[Pair]:
    """Return images of the first set that are also in the second: the same file, an equal one, or a similar one.

    Args:
        looks: of the images of both; unreadable images have none and are skipped.

    Returns:
        for each image of the first set at most one pair, the closest.
    """
    one: dict[str, list[Path]] = defaultdict(list)  # digest -> images
    for path in dict.fromkeys(record.path for record in first if record.path in looks):
        one[looks[path].digest].append(path)
    other = {looks[record.path].digest: record.path for record in second if record.path in looks}
    best = {digest: (other[digest], -1) for digest in one if digest in other}
    # equal files are known already; the search itself does not know the two sets
    left = {digest: looks[paths[0]] for digest, paths in one.items() if digest not in best}
    right = {digest: looks[path] for digest, path in other.items()}
    for a, b, bits in _close([*left.values(), *right.values()], distance):
        mine, theirs = (a, b) if a.digest in left else (b, a)
        is_across = mine.digest in left and theirs.digest in right
        if is_across and bits < best.get(mine.digest, (None, BITS))[1]:
            best[mine.digest] = (theirs.path, bits)
    return [Pair(path, *best[digest]) for digest, paths in one.items() if digest in best for path in paths]


def _close(looks: Sequence[Look], distance: int) -> Iterator[tuple[Look, Look, int]]:
    """Return pairs whose fingerprints differ in at most ``distance`` bits and whose coarse images agree too."""
    prints = [look.fingerprint for look in looks]
    for first, second in sorted(pairs_within(prints, distance)):
        a, b = looks[first], looks[second]
        difference = np.abs(a.coarse.astype(np.int16) - b.coarse.astype(np.int16)).max(axis=2)  # (COARSE, COARSE)
        if (difference > CELL_DIFFERENCE).mean() <= OTHER_CELLS:
            yield a, b, (a.fingerprint ^ b.fingerprint).bit_count()


def pairs_within(fingerprints: Sequence[int], distance: int) -> set[tuple[int, int]]:
    """Yield indices (i < j) of all fingerprints of ``BITS`` bits that differ in at most ``distance`` bits.

    Multi-index hashing (M. Norouzi, A. Punjani, D. J. Fleet, "Fast Search in Hamming Space with Multi-Index Hashing",
    CVPR 2012): of ``distance + 1`` bands at least one is equal in such a pair, so that only fingerprints that share a
    band are compared. It is exact, and far faster than comparing all with all.
    """
    distinct: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(fingerprints):
        distinct[value].append(index)
    close: set[tuple[int, int]] = set()  # of values
    for start, stop in _bands(distance + 1):
        mask = (1 << (stop - start)) - 1
        shelves: dict[int, list[int]] = defaultdict(list)
        for value in distinct:
            shelves[value >> start & mask].append(value)
        for values in shelves.values():
            close.update(_within(values, distance))
    found = {pair for indices in distinct.values() for pair in combinations(indices, 2)}
    for a, b in close:
        found |= {(min(i, j), max(i, j)) for i in distinct[a] for j in distinct[b]}
    return found


def _within(values: list[int], distance: int) -> Iterator[tuple[int, int]]:
    """Return pairs within one bin; drawings on white paper fill some bins with thousands, which numpy compares
    faster."""
    if len(values) <= _FEW:
        yield from ((a, b) for a, b in combinations(values, 2) if (a ^ b).bit_count() <= distance)
        return
    rows = np.frombuffer(b"".join(value.to_bytes(BITS // 8, "big") for value in values), dtype=np.uint8)
    rows = rows.reshape(len(values), BITS // 8)
    for index, value in enumerate(values[:-1]):
        bits = _BITS_OF_BYTE[rows[index + 1 :] ^ rows[index]].sum(axis=1)
        yield from ((value, values[index + 1 + other]) for other in np.flatnonzero(bits <= distance))


def _bands(count: int) -> list[tuple[int, int]]:
    """``count`` bands of nearly equal width as (lowest bit, bit behind the highest)."""
    edges = [round(index * BITS / count) for index in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _grouped(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Return pairs by connected group, in the order of their first pair."""
    group_of: dict[Path, list[Pair]] = {}
    for pair in pairs:
        first, second = group_of.get(pair.first), group_of.get(pair.second)
        group = first if first is not None else second if second is not None else []
        if first is not None and second is not None and first is not second:
            first += second
            for known in second:
                group_of[known.first] = group_of[known.second] = first
        group.append(pair)
        group_of[pair.first] = group_of[pair.second] = group
    return list({id(group): group for group in group_of.values()}.values())
