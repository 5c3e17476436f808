"""The latent cache: which latents a run needs, which exist, filling it, and reading them for a batch."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.architectures.formats import LatentFormat
from library.data.cache_format import (
    CachedLatents,
    array_suffix,
    cache_path,
    check_places,
    is_current,
    read_cache,
    read_sample,
)
from library.data.image_io import covering_size, crop_box
from library.data.latent_encoding import THREADS, Encode, Wanted, encode_all, to_pixels, to_weights
from library.errors import USER_ERROR_EXIT_CODE, UserError

logger = logging.getLogger(__name__)

__all__ = [
    "DiskLatents",
    "Encode",
    "MemoryLatents",
    "Peers",
    "StoredSample",
    "Wanted",
    "barrier",
    "fill",
    "to_pixels",
    "to_weights",
]


@dataclass(frozen=True)
class Peers:
    """The processes that fill one cache together; alone by default."""

    rank: int = 0
    count: int = 1
    #: gathers the items of all processes, in the order of their ranks
    gather: Callable[[list[Any]], list[Any]] = lambda items: items


@dataclass(frozen=True)
class StoredSample:
    """The cached data for one use."""

    latents: Tensor  # (C, h, w) float32
    alpha_mask: Tensor | None  # (H, W) float32 in [0, 1], mirrored with the latents; only where it is wanted


def check_one_file_each(wanted: Iterable[Wanted], format: LatentFormat) -> None:
    """Refuse latents that would overwrite each other's file.

    Raises:
        UserError: names the images.
    """
    taken: dict[tuple[Path, str], Wanted] = {}
    problems = []
    for w in wanted:
        path = cache_path(w.path, w.size, format)
        other = taken.setdefault((path, array_suffix(w.bucket, format)), w)
        if other is w:
            continue
        if other.path != w.path:
            problems.append(f"{other.path} and {w.path}: both would be cached in {path.name}; rename one of them")
        else:
            problems.append(
                f"{w.path}: {path.name} holds one size and one way of resizing, but datasets ask for {_way(other)} and "
                f"{_way(w)}; use --cache_latents without --cache_latents_to_disk, or a copy of the folder"
            )
    if problems:
        more = f"\nand {len(problems) - 3} more images" if len(problems) > 3 else ""
        raise UserError("\n".join(problems[:3]) + more)


def _way(wanted: Wanted) -> str:
    return f"{wanted.bucket[0]}x{wanted.bucket[1]} ({wanted.interpolation or 'default'})"


def find_current(
    wanted: Sequence[Wanted], format: LatentFormat, *, vae_identity: str, trust: bool
) -> dict[Wanted, bool]:
    """For each wanted image, return whether its latents on disk can be used; warnings name damaged and outdated files.

    Args:
        trust: use existing files without a check (``--skip_cache_check``).
    """
    if trust:
        return {w: cache_path(w.path, w.size, format).exists() for w in wanted}
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda w: _examine(w, format, vae_identity), wanted))
    of_state: dict[str, list[str]] = {}
    for state in found:
        if state.problem:
            of_state.setdefault(state.problem, []).append(state.text)
    for problem, texts in of_state.items():
        # one line for each kind, as a new VAE makes every file of a large folder outdated
        more = f"; and {len(texts) - 3} more files" if len(texts) > 3 else ""
        logger.warning("latents are made again, as %s: %s%s", problem, "; ".join(texts[:3]), more)
    return dict(zip(wanted, (state.usable for state in found), strict=True))


@dataclass(frozen=True)
class _State:
    """The state of one cache file."""

    usable: bool
    problem: str = ""  # the kind of problem, the same for all files of a kind; "" without a warning
    text: str = ""  # the file and its problem


def _examine(wanted: Wanted, format: LatentFormat, vae_identity: str) -> _State:
    path = cache_path(wanted.path, wanted.size, format)
    try:
        found = read_cache(path, wanted.bucket, format)
    except ValueError as error:
        return _State(False, "files are damaged", str(error))
    if found is None:
        return _State(False)
    cached, stamp = found
    if cached.original_size != wanted.size or (wanted.flip and cached.latents_flipped is None):
        return _State(False)
    if wanted.alpha_mask and cached.alpha_mask is None:
        return _State(False)
    arrays = (cached.latents, cached.latents_flipped, cached.alpha_mask)
    if not all(np.isfinite(values).all() for values in arrays if values is not None):
        return _State(False, "files hold values that are not finite", str(path))
    if stamp is None:
        return _State(True)
    crop = crop_box(covering_size(wanted.size, wanted.bucket), wanted.bucket)
    if cached.crop_ltrb == crop and is_current(
        stamp, wanted.path, vae=vae_identity, bucket=wanted.bucket, interpolation=wanted.interpolation
    ):
        return _State(True)
    return _State(False, "files are of another image, VAE, size or way of resizing", str(path))


class DiskLatents:
    """Latents in cache files, read on use."""

    def __init__(self, format: LatentFormat) -> None:
        self._format = format

    def get(self, wanted: Wanted, *, flipped: bool) -> StoredSample:
        """Latents, and the mask if it is wanted.

        Raises:
            UserError: the file vanished or was damaged since it was checked.
        """
        path = cache_path(wanted.path, wanted.size, self._format)
        try:
            latents, mask = read_sample(
                path, wanted.bucket, self._format, flipped=flipped, alpha_mask=wanted.alpha_mask
            )
        except ValueError as error:
            raise UserError(f"{error}; start again without --skip_cache_check to make it anew") from None
        if latents is None or (wanted.alpha_mask and mask is None):
            lacking = "alpha mask" if latents is not None else "mirrored latents" if flipped else "latents"
            raise UserError(
                f"{path}: has no {lacking} of {wanted.bucket[0]}x{wanted.bucket[1]}; "
                "start again without --skip_cache_check to make it anew"
            )
        return StoredSample(torch.from_numpy(latents), None if mask is None else torch.from_numpy(mask))


class MemoryLatents:
    """Latents in memory, one tensor per size, which loader workers share however they are started."""

    def __init__(self, wanted: Sequence[Wanted], format: LatentFormat) -> None:
        self._rows: dict[tuple[Path, tuple[int, int], str | None, bool], int] = {}
        counts: Counter[tuple[int, int]] = Counter()
        self._mask_rows: dict[tuple[Path, tuple[int, int], str | None, bool], int] = {}
        mask_counts: Counter[tuple[int, int]] = Counter()
        for w in wanted:
            if w.alpha_mask:
                self._mask_rows[self._key(w, False)] = mask_counts[w.bucket]
                mask_counts[w.bucket] += 1
            for flipped in (False, True)[: 1 + w.flip]:
                self._rows[self._key(w, flipped)] = counts[w.bucket]
                counts[w.bucket] += 1
        self._stacks = {
            (width, height): torch.empty(count, format.channels, height // format.stride, width // format.stride)
            for (width, height), count in counts.items()
        }
        # as bytes: they come from 8 bit, and as floats they would take 16 times the latents' memory
        self._mask_stacks = {
            (width, height): torch.empty(count, height, width, dtype=torch.uint8)
            for (width, height), count in mask_counts.items()
        }

    @staticmethod
    def _key(wanted: Wanted, flipped: bool) -> tuple[Path, tuple[int, int], str | None, bool]:
        return wanted.path, wanted.bucket, wanted.interpolation, flipped

    def put(self, wanted: Wanted, cached: CachedLatents) -> None:
        stack = self._stacks[wanted.bucket]
        stack[self._rows[self._key(wanted, False)]] = torch.from_numpy(cached.latents)
        if cached.latents_flipped is not None:
            stack[self._rows[self._key(wanted, True)]] = torch.from_numpy(cached.latents_flipped)
        if cached.alpha_mask is not None:
            row = self._mask_rows[self._key(wanted, False)]
            self._mask_stacks[wanted.bucket][row] = torch.from_numpy(cached.alpha_mask * 255.0).round()

    def get(self, wanted: Wanted, *, flipped: bool) -> StoredSample:
        """Latents, and the mask if it is wanted."""
        latents = self._stacks[wanted.bucket][self._rows[self._key(wanted, flipped)]]
        if not wanted.alpha_mask:
            return StoredSample(latents, None)
        mask = to_weights(self._mask_stacks[wanted.bucket][self._mask_rows[self._key(wanted, False)]].numpy())
        return StoredSample(latents, mask.flip(1) if flipped else mask)


def fill(
    wanted: Sequence[Wanted],
    encode: Callable[[], Encode],
    format: LatentFormat,
    *,
    batch_size: int,
    to_disk: bool,
    vae_identity: str,
    trust: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    peers: Peers = Peers(),
    pin_memory: bool = False,
) -> tuple[DiskLatents | MemoryLatents, int]:
    """Complete the cache; return it, and how many images had to be encoded by all processes together.

    On disk, each file belongs to one process, which checks it; missing ones are then distributed evenly, with a barrier
    at the end. In memory, each process makes its own.

    Args:
        wanted: the same for all processes.
        encode: called only if this process has something to encode.
        batch_size: images encoded at a time.
        to_disk: keep the latents beside the images instead of in memory.
        vae_identity: stamped into files.
        trust: use files without comparing them with image and VAE.
        report: called with this process's images done and their total; an exception from it ends the filling.
        pin_memory: see ``encode_all``.

    Raises:
        UserError: see ``encode_all``; two latents that would overwrite each other.
        SystemExit: another process had an error, which it names itself.
    """

    def encoded(share: Sequence[Wanted], store: MemoryLatents | None) -> None:
        if not share:
            return
        made = encode_all(
            share,
            encode(),
            format,
            batch_size=batch_size,
            to_disk=to_disk,
            vae_identity=vae_identity,
            pin_memory=pin_memory,
        )
        with contextlib.closing(made):
            for done, (w, cached) in enumerate(made, start=1):
                if store is not None:
                    store.put(w, cached)
                report(done, len(share))

    if not to_disk:
        memory = MemoryLatents(wanted, format)
        encoded(wanted, memory)
        return memory, len(wanted)
    check_one_file_each(wanted, format)
    mine = _share(wanted, range(len(wanted)), format, peers)
    usable = find_current([wanted[i] for i in mine], format, vae_identity=vae_identity, trust=trust)
    missing = sorted(peers.gather([i for i in mine if not usable[wanted[i]]]))
    share = [wanted[i] for i in _share(wanted, missing, format, peers)]
    with barrier(peers):
        check_places((cache_path(w.path, w.size, format) for w in share), "--cache_latents_to_disk")
        encoded(share, None)
    return DiskLatents(format), len(missing)


def _share(wanted: Sequence[Wanted], indices: Iterable[int], format: LatentFormat, peers: Peers) -> list[int]:
    """Return this process's part: files in turn, bucket by bucket, so that each process gets its part of every
    bucket."""
    files: dict[Path, list[int]] = {}
    for i in sorted(indices, key=lambda i: (wanted[i].bucket, i)):
        files.setdefault(cache_path(wanted[i].path, wanted[i].size, format), []).append(i)
    return [i for number, members in enumerate(files.values()) if number % peers.count == peers.rank for i in members]


@contextlib.contextmanager
def barrier(peers: Peers) -> Iterator[None]:
    """Wait for all processes at the end of the context, also after an error; an error of one ends all."""
    code: str | int | None = 0
    error: BaseException | None = None
    try:
        yield
    except (UserError, SystemExit) as raised:
        error = raised
        code = raised.code if isinstance(raised, SystemExit) else USER_ERROR_EXIT_CODE
    codes = peers.gather([code])
    if error is not None:
        raise error
    if any(codes):
        raise SystemExit(max(codes))
