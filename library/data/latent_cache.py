"""Filling the latent cache: pictures are read ahead in threads while the VAE works, files written behind it."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.architectures.base import LatentFormat
from library.data.cache_format import (
    CachedLatents,
    Stamp,
    array_suffix,
    cache_path,
    is_current,
    make_stamp,
    read_cache,
    read_sample,
    write_cache,
)
from library.data.image_io import Fitted, covering_size, cut_mask, fit, read_image, read_image_and_alpha
from library.errors import UserError
from library.randomness import torch_generator

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, Sequence[torch.Generator]], Tensor]

#: threads that read pictures and check files; Pillow, OpenCV and hashing let go of the interpreter's lock
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Wanted:
    """Latents that a run needs."""

    path: Path
    size: tuple[int, int]  # (W, H) of the picture
    bucket: tuple[int, int]  # (W, H)
    interpolation: str | None
    flip: bool  # whether the mirrored picture's are needed too
    alpha_mask: bool = False  # whether the picture's opacity is needed too


@dataclass(frozen=True)
class StoredSample:
    """What a cache gives for one use."""

    latents: Tensor  # (C, h, w) float32
    alpha_mask: Tensor | None  # (H, W) float32 in [0, 1], mirrored with the latents; only where it is wanted


def to_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1.0


def to_weights(mask: np.ndarray) -> Tensor:
    """uint8 (H, W) -> float32 (H, W) in [0, 1]."""
    return torch.from_numpy(mask.astype(np.float32) / np.float32(255.0))


def check_one_file_each(wanted: Iterable[Wanted], format: LatentFormat) -> None:
    """Refuse latents that would overwrite each other's file.

    Raises:
        UserError: names the pictures.
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
        more = f"\nand {len(problems) - 3} more pictures" if len(problems) > 3 else ""
        raise UserError("\n".join(problems[:3]) + more)


def _way(wanted: Wanted) -> str:
    return f"{wanted.bucket[0]}x{wanted.bucket[1]} ({wanted.interpolation or 'default'})"


def find_current(
    wanted: Sequence[Wanted], format: LatentFormat, *, vae_identity: str, trust: bool
) -> dict[Wanted, bool]:
    """Whether each has latents on disk that may be used; damaged and outdated files are named in a warning.

    Args:
        trust: take what is there without looking into it (``--skip_cache_check``).
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda w: _is_usable(w, format, vae_identity=vae_identity, trust=trust), wanted)
        return dict(zip(wanted, found, strict=True))


def _is_usable(wanted: Wanted, format: LatentFormat, *, vae_identity: str, trust: bool) -> bool:
    path = cache_path(wanted.path, wanted.size, format)
    if trust:
        return path.exists()
    try:
        found = read_cache(path, wanted.bucket, format)
    except ValueError as error:
        logger.warning("%s and made again", error)
        return False
    if found is None:
        return False
    cached, stamp = found
    if cached.original_size != wanted.size or (wanted.flip and cached.latents_flipped is None):
        return False
    if wanted.alpha_mask and cached.alpha_mask is None:
        return False
    arrays = (cached.latents, cached.latents_flipped, cached.alpha_mask)
    if not all(np.isfinite(values).all() for values in arrays if values is not None):
        logger.warning("%s: holds values that are not finite, and is made again", path)
        return False
    same = stamp is None or is_current(
        stamp, wanted.path, vae=vae_identity, bucket=wanted.bucket, interpolation=wanted.interpolation
    )
    if not same:
        logger.warning("%s: made from another picture, VAE or size, and is made again", path)
    return same


class DiskLatents:
    """Latents in cache files, read when they are used."""

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
    """Latents in memory, one tensor for each size, which loader workers share however they are started."""

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
        # as bytes: they come from 8 bit, and as floats they would take 16 times the latents' room
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


@dataclass(frozen=True)
class _Prepared:
    fitted: Fitted
    alpha_mask: np.ndarray | None  # float32 (H, W)
    stamp: Stamp | None  # of what goes to disk


def encode_all(
    wanted: Sequence[Wanted],
    encode: Encode,
    format: LatentFormat,
    *,
    batch_size: int,
    to_disk: bool,
    vae_identity: str,
) -> Iterator[tuple[Wanted, CachedLatents]]:
    """Encode pictures, those of one bucket together; yields each as it is done.

    The draw from the VAE's posterior is keyed by the picture's name and bucket, not by its batch.

    Raises:
        UserError: a picture that cannot be read; latents that are not finite; a full disk.
    """
    batches = list(_batches(wanted, batch_size))
    stamped_with = vae_identity if to_disk else None
    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(1) as writer:
        ahead: deque[list[Future[_Prepared]]] = deque()
        writes: deque[Future[None]] = deque()
        upcoming = iter(batches)

        def read_next() -> None:
            batch = next(upcoming, None)
            if batch is not None:
                ahead.append([readers.submit(_prepare, w, stamped_with) for w in batch])

        try:
            # enough batches ahead to keep every reader at work while the VAE has one
            for _ in range(2 + THREADS // batch_size):
                read_next()
            for batch in batches:
                prepared = [future.result() for future in ahead.popleft()]
                read_next()
                pixels = torch.stack([to_pixels(p.fitted.pixels) for p in prepared])
                plain = _encoded(encode, batch, pixels, "plain")
                mirrored = _encoded(encode, batch, pixels.flip(3), "mirrored") if any(w.flip for w in batch) else None
                for i, (w, p) in enumerate(zip(batch, prepared, strict=True)):
                    flipped = mirrored[i] if mirrored is not None and w.flip else None
                    cached = CachedLatents(plain[i], flipped, w.size, p.fitted.crop_ltrb, p.alpha_mask)
                    if p.stamp is not None:
                        path = cache_path(w.path, w.size, format)
                        writes.append(writer.submit(write_cache, path, cached, p.stamp, format))
                    yield w, cached
                while writes and (writes[0].done() or len(writes) > 4 * batch_size):
                    writes.popleft().result()
            while writes:
                writes.popleft().result()
        finally:
            # after an error nothing more is read
            for future in (future for waiting in ahead for future in waiting):
                future.cancel()


def _encoded(encode: Encode, batch: Sequence[Wanted], pixels: Tensor, side: str) -> np.ndarray:
    """(B, 3, H, W) -> float32 (B, C, h, w)."""
    latents = encode(pixels, [_generator(w, side) for w in batch]).float().cpu()
    finite = latents.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        names = ", ".join(str(w.path) for w, good in zip(batch, finite.tolist(), strict=True) if not good)
        raise UserError(f"{names}: the VAE gives values that are not finite; use --no_half_vae, or another --vae")
    return latents.numpy()


def _prepare(wanted: Wanted, vae_identity: str | None) -> _Prepared:
    stamp = None
    if vae_identity is not None:
        stamp = make_stamp(wanted.path, vae=vae_identity, bucket=wanted.bucket, interpolation=wanted.interpolation)
    if not wanted.alpha_mask:
        fitted = fit(read_image(wanted.path), wanted.bucket, interpolation=wanted.interpolation)
        return _Prepared(fitted, None, stamp)
    image, alpha = read_image_and_alpha(wanted.path)
    fitted = fit(image, wanted.bucket, interpolation=wanted.interpolation)
    mask = cut_mask(alpha, covering_size(wanted.size, wanted.bucket), fitted.crop_ltrb)
    return _Prepared(fitted, to_weights(mask).numpy(), stamp)


def _batches(wanted: Sequence[Wanted], batch_size: int) -> Iterator[list[Wanted]]:
    by_bucket: dict[tuple[int, int], list[Wanted]] = {}
    for w in wanted:
        by_bucket.setdefault(w.bucket, []).append(w)
    for bucket in sorted(by_bucket):
        members = by_bucket[bucket]
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _generator(wanted: Wanted, side: str) -> torch.Generator:
    return torch_generator("latents", wanted.path.name, wanted.bucket[0], wanted.bucket[1], side)
