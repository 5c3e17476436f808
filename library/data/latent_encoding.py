"""Encode images: threads read ahead, the VAE works without a pause, files are written behind it.

    readers (threads): file -> uint8 (3, H, W), stamp
    assembler (thread): batch -> float32 (B, 3, H, W), pinned where a GPU takes it
    caller's thread: VAE, one batch ahead of what is fetched back from the device
    writers (threads): latents -> cache file

Memory is bounded: about ``2 * batch_size + THREADS`` images wait for the VAE and ``_WRITES`` latents for the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from library.architectures.formats import LatentFormat
from library.data.cache_format import CachedLatents, Stamp, cache_path, make_stamp, write_cache
from library.data.image_io import covering_size, cut_mask, fit, read_image, read_image_and_alpha
from library.errors import UserError
from library.randomness import torch_generator

#: pixels (B, 3, H, W) in [-1, 1] on the host and a generator for each -> latents (B, C, h, w) on any device
Encode = Callable[[Tensor, Sequence[torch.Generator]], Tensor]

#: threads that read images and check files; Pillow, OpenCV and hashing release the interpreter's lock
THREADS = min(8, os.cpu_count() or 1)
#: threads that write, so that one flush to the disk does not wait for another
_WRITERS = 4
#: files that may wait to be written
_WRITES = 64


@dataclass(frozen=True)
class Wanted:
    """Latents that a run needs."""

    path: Path
    size: tuple[int, int]  # (W, H) of the image
    bucket: tuple[int, int]  # (W, H)
    interpolation: str | None
    flip: bool  # whether the flipped image's are needed too
    alpha_mask: bool = False  # whether the image's opacity is needed too


def to_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return _to_unit(torch.from_numpy(_channels_first(pixels)))


def to_weights(mask: np.ndarray) -> Tensor:
    """uint8 (H, W) -> float32 (H, W) in [0, 1]."""
    return torch.from_numpy(mask.astype(np.float32) / np.float32(255.0))


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_unit(pixels: Tensor) -> Tensor:
    """uint8 0 to 255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


@dataclass(frozen=True)
class _Prepared:
    pixels: np.ndarray  # uint8 (3, H, W)
    crop_ltrb: tuple[int, int, int, int]
    alpha_mask: np.ndarray | None  # float32 (H, W)
    stamp: Stamp | None  # of what goes to disk


@dataclass(frozen=True)
class _Assembled:
    prepared: list[_Prepared]
    plain: Tensor  # (B, 3, H, W)
    mirrored: Tensor | None  # of those that are needed so, in their order


@dataclass(frozen=True)
class _Encoded:
    """A batch that is being copied back from the device."""

    batch: list[Wanted]
    prepared: list[_Prepared]
    plain: Tensor  # (B, C, h, w)
    mirrored: Tensor | None


def encode_all(
    wanted: Sequence[Wanted],
    encode: Encode,
    format: LatentFormat,
    *,
    batch_size: int,
    to_disk: bool,
    vae_identity: str,
    pin_memory: bool = False,
) -> Generator[tuple[Wanted, CachedLatents], None, None]:
    """Encode images, those of one bucket together; yields each as it is done.

    The sample from the VAE's posterior is keyed by the image's name and bucket, not by its batch. A caller that stops
    early closes the iterator; everything yielded is then on disk.

    Args:
        encode: is called for a batch before the results of the previous batch are awaited, so a GPU need not pause.
        pin_memory: copy batches to pinned memory.

    Raises:
        UserError: an image that cannot be read; latents that are not finite; a full disk.
    """
    stamped_with = vae_identity if to_disk else None
    batches = list(_batches(wanted, batch_size))
    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(1) as assembler, _Writers(format) as writers:
        ahead: deque[Future[_Assembled]] = deque()
        upcoming = iter(batches)

        def read_next() -> None:
            batch = next(upcoming, None)
            if batch is not None:
                read = [readers.submit(_prepare, w, stamped_with) for w in batch]
                ahead.append(assembler.submit(_assemble, batch, read, pin_memory))

        def fetched(encoded: _Encoded) -> Iterator[tuple[Wanted, CachedLatents]]:
            for w, cached, stamp in _fetch(encoded):
                if stamp is not None:
                    writers.put(cache_path(w.path, w.size, format), cached, stamp)
                yield w, cached

        try:
            # enough batches ahead to keep every reader busy while the VAE works on one
            for _ in range(2 + THREADS // batch_size):
                read_next()
            running: _Encoded | None = None
            for batch in batches:
                assembled = ahead.popleft().result()
                read_next()
                started = _start(encode, batch, assembled)
                if running is not None:
                    yield from fetched(running)
                running = started
            if running is not None:
                yield from fetched(running)
            writers.finish()
        finally:
            # after an error nothing more is read
            readers.shutdown(wait=False, cancel_futures=True)
            assembler.shutdown(wait=False, cancel_futures=True)


def _start(encode: Encode, batch: list[Wanted], assembled: _Assembled) -> _Encoded:
    plain = encode(assembled.plain, [_generator(w, "plain") for w in batch])
    mirrored = None
    if assembled.mirrored is not None:
        mirrored = encode(assembled.mirrored, [_generator(w, "mirrored") for w in batch if w.flip])
    return _Encoded(batch, assembled.prepared, plain, mirrored)


def _fetch(encoded: _Encoded) -> Iterator[tuple[Wanted, CachedLatents, Stamp | None]]:
    plain = _on_host(encoded.plain, encoded.batch)
    mirrored = iter(())
    if encoded.mirrored is not None:
        mirrored = iter(_on_host(encoded.mirrored, [w for w in encoded.batch if w.flip]))
    for w, p, latents in zip(encoded.batch, encoded.prepared, plain, strict=True):
        flipped = next(mirrored) if w.flip else None
        yield w, CachedLatents(latents, flipped, w.size, p.crop_ltrb, p.alpha_mask), p.stamp


def _on_host(latents: Tensor, batch: Sequence[Wanted]) -> np.ndarray:
    """(B, C, h, w) -> the same as float32."""
    latents = latents.float().cpu()
    finite = latents.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        names = ", ".join(str(w.path) for w, good in zip(batch, finite.tolist(), strict=True) if not good)
        raise UserError(f"{names}: the VAE gives values that are not finite; use --no_half_vae, or another --vae")
    return latents.numpy()


def _prepare(wanted: Wanted, vae_identity: str | None) -> _Prepared:
    stamp = None
    if vae_identity is not None:
        stamp = make_stamp(wanted.path, vae=vae_identity, bucket=wanted.bucket, interpolation=wanted.interpolation)
    image, alpha = read_image_and_alpha(wanted.path) if wanted.alpha_mask else (read_image(wanted.path), None)
    fitted = fit(image, wanted.bucket, interpolation=wanted.interpolation)
    mask = None
    if alpha is not None:
        mask = to_weights(cut_mask(alpha, covering_size(wanted.size, wanted.bucket), fitted.crop_ltrb)).numpy()
    return _Prepared(_channels_first(fitted.pixels), fitted.crop_ltrb, mask, stamp)


def _assemble(batch: Sequence[Wanted], read: Sequence[Future[_Prepared]], pin_memory: bool) -> _Assembled:
    prepared = [future.result() for future in read]
    plain = _to_unit(torch.from_numpy(np.stack([p.pixels for p in prepared])))  # (B, 3, H, W)
    rows = [i for i, w in enumerate(batch) if w.flip]
    mirrored = plain[rows].flip(3) if rows else None
    if pin_memory:
        plain = plain.pin_memory()
        mirrored = mirrored.pin_memory() if mirrored is not None else None
    return _Assembled(prepared, plain, mirrored)


def _batches(wanted: Iterable[Wanted], batch_size: int) -> Iterator[list[Wanted]]:
    by_bucket: dict[tuple[int, int], list[Wanted]] = {}
    for w in wanted:
        by_bucket.setdefault(w.bucket, []).append(w)
    for bucket in sorted(by_bucket):
        members = by_bucket[bucket]
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _generator(wanted: Wanted, side: str) -> torch.Generator:
    return torch_generator("latents", wanted.path.name, wanted.bucket[0], wanted.bucket[1], side)


class _Writers:
    """Threads that write cache files; all latents of one file go to one thread, because each adds its size to it."""

    def __init__(self, format: LatentFormat) -> None:
        self._format = format
        self._threads = [ThreadPoolExecutor(1) for _ in range(_WRITERS)]
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> _Writers:
        return self

    def put(self, path: Path, cached: CachedLatents, stamp: Stamp) -> None:
        """Queue a file for writing; blocks while too many are queued.

        Raises:
            UserError: an earlier one could not be written.
        """
        thread = self._threads[hash(path) % len(self._threads)]
        self._waiting.append(thread.submit(write_cache, path, cached, stamp, self._format))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _WRITES):
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait until all is written; raises like ``put``."""
        while self._waiting:
            self._waiting.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after an error too: what was encoded is kept
        with contextlib.ExitStack() as stack:
            for thread in self._threads:
                stack.callback(thread.shutdown)
