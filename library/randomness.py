"""Randomness as a function: every draw is keyed by its purpose, so nothing depends on history.

A *visit* is one use of one image in one epoch. Everything random about a sample (its caption, flip,
crop, noise, timestep) comes from generators keyed by the visit, so a run does not depend on the
number of workers, on ranks, or on where it was resumed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_KEY_BITS = 63  # torch seeds are int64; one bit less keeps every key positive


def key(*parts: int | str) -> int:
    """Return a 63-bit number that depends on every part and on their order.

    Integers and strings of the same spelling give different keys.

    Raises:
        TypeError: for a part that is neither ``int`` nor ``str``.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a key is made of int and str, not {type(part).__name__}: {part!r}")
        tag = b"i" if isinstance(part, int) else b"s"
        # file names that are not UTF-8 keep their bytes as lone surrogates
        text = str(part).encode("utf-8", "surrogateescape")
        # the length is included, so that ("ab", "c") and ("a", "bc") differ
        digest.update(tag + len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> (64 - _KEY_BITS)


def visit_key(seed: int, epoch: int, dataset: int, record: int, repeat: int) -> int:
    """Return the key of one use of one image: the root of everything random about that sample."""
    return key(seed, "visit", epoch, dataset, record, repeat)


def torch_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose; on the CPU, so that every device draws the same numbers."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(key(*parts))
    return generator


@dataclass(frozen=True)
class Draw:
    """Random numbers of a batch's samples, each keyed by the sample's visit."""

    visits: Sequence[int]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A CPU generator for each sample."""
        return [torch_generator(visit, purpose) for visit in self.visits]


def python_rng(*parts: int | str) -> random.Random:
    """Return a ``random.Random`` for one purpose."""
    return random.Random(key(*parts))


def permutation(n: int, *parts: int | str) -> list[int]:
    """Return a keyed order of ``range(n)``."""
    return torch.randperm(n, generator=torch_generator(*parts)).tolist()
