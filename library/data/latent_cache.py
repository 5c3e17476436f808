"""Filling the latent cache: pictures are read ahead in threads while the VAE works, files written behind it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.architectures.base import LatentFormat
from library.data.cache_format import (
    CachedLatents,
    cache_path,
    is_current,
    make_stamp,
    read_cache,
    write_cache,
)
from library.data.image_io import Fitted, fit, read_image
from library.randomness import torch_generator

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, Sequence[torch.Generator]], Tensor]

_THREADS = 2
#: batches read ahead of the VAE
_AHEAD = 2


@dataclass(frozen=True)
class Wanted:
    """Latents that a run needs."""

    path: Path
    size: tuple[int, int]  # (W, H) of the picture
    bucket: tuple[int, int]  # (W, H)
    interpolation: str | None
    flip: bool  # whether the mirrored picture's are needed too


def to_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1.0


def load_current(wanted: Wanted, format: LatentFormat, *, vae_identity: str, trust: bool) -> CachedLatents | None:
    """Latents from disk if they may be used, else ``None``; damaged and outdated files are named in a warning.

    Args:
        trust: take what is there without comparing it with picture and VAE (``--skip_cache_check``).
    """
    path = cache_path(wanted.path, wanted.size, format)
    try:
        found = read_cache(path, wanted.bucket, format)
    except ValueError as error:
        logger.warning("%s and made again", error)
        return None
    if found is None:
        return None
    cached, stamp = found
    if wanted.flip and cached.latents_flipped is None:
        return None
    if not np.isfinite(cached.latents).all():
        logger.warning("%s: holds values that are not finite, and is made again", path)
        return None
    if stamp is None or trust:
        return cached
    same = is_current(
        stamp, wanted.path, vae=vae_identity, bucket=wanted.bucket, interpolation=wanted.interpolation
    )
    if not same:
        logger.warning("%s: made from another picture, VAE or size, and is made again", path)
    return cached if same else None


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
    """
    batches = list(_batches(wanted, batch_size))
    with ThreadPoolExecutor(_THREADS) as readers, ThreadPoolExecutor(1) as writer:
        ahead: deque[list[Future[Fitted]]] = deque()
        writes: list[Future[None]] = []
        upcoming = iter(batches)

        def read_next() -> None:
            batch = next(upcoming, None)
            if batch is not None:
                ahead.append([readers.submit(_read_and_fit, w) for w in batch])

        for _ in range(_AHEAD + 1):
            read_next()
        for batch in batches:
            fitted = [future.result() for future in ahead.popleft()]
            read_next()
            pixels = torch.stack([to_pixels(f.pixels) for f in fitted])
            plain = encode(pixels, [_generator(w, "plain") for w in batch]).numpy()
            mirrored = None
            if any(w.flip for w in batch):
                mirrored = encode(pixels.flip(3), [_generator(w, "mirrored") for w in batch]).numpy()
            for i, (w, f) in enumerate(zip(batch, fitted, strict=True)):
                flipped = mirrored[i] if mirrored is not None and w.flip else None
                cached = CachedLatents(plain[i], flipped, w.size, f.crop_ltrb)
                if to_disk:
                    writes.append(writer.submit(_write, w, cached, format, vae_identity))
                yield w, cached
            while writes and writes[0].done():
                writes.pop(0).result()
        for write in writes:
            write.result()


def _batches(wanted: Sequence[Wanted], batch_size: int) -> Iterator[list[Wanted]]:
    by_bucket: dict[tuple[int, int], list[Wanted]] = {}
    for w in wanted:
        by_bucket.setdefault(w.bucket, []).append(w)
    for bucket in sorted(by_bucket):
        members = by_bucket[bucket]
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _read_and_fit(wanted: Wanted) -> Fitted:
    return fit(read_image(wanted.path), wanted.bucket, interpolation=wanted.interpolation)


def _generator(wanted: Wanted, side: str) -> torch.Generator:
    return torch_generator("latents", wanted.path.name, wanted.bucket[0], wanted.bucket[1], side)


def _write(wanted: Wanted, cached: CachedLatents, format: LatentFormat, vae_identity: str) -> None:
    stamp = make_stamp(wanted.path, vae=vae_identity, bucket=wanted.bucket, interpolation=wanted.interpolation)
    write_cache(cache_path(wanted.path, wanted.size, format), cached, stamp, format)
