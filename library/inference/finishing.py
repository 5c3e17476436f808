"""Decode and save images while the next ones are generated."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.inference.generate import decode_images
from library.inference.models import GenerateOptions, ImageModels
from library.inference.png import save_png

if TYPE_CHECKING:
    from PIL.Image import Image


class Finisher:
    """Decodes and saves batches in a thread of its own, one at a time.

    On an accelerator the batch is decoded in the thread too; CUDA has a stream of its own for that. On the CPU, where
    decoding would only take the cores from the generation, the batch is decoded at once, and saved in the thread.
    Leaving the context waits, and raises what went wrong; so does the next batch.

    Args:
        decodes_beside: whether batches are decoded in the thread; None for what the device asks for.
    """

    def __init__(self, models: ImageModels, options: GenerateOptions, *, decodes_beside: bool | None = None) -> None:
        self._models, self._options = models, options
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher")
        self._pending: Future[None] | None = None
        self._decodes_beside = options.device.type != "cpu" if decodes_beside is None else decodes_beside
        self._stream = torch.cuda.Stream(options.device) if options.device.type == "cuda" else None

    def __enter__(self) -> Finisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._thread.shutdown(wait=True)

    def finish(self, latents: Tensor, paths: Sequence[Path], records: Sequence[Mapping[str, str]]) -> None:
        """Decode latents (B, C, h, w) and write each image to its path with its PNG texts."""
        self._wait()
        if not self._decodes_beside:
            images = decode_images(self._models, latents, self._options)
            self._pending = self._thread.submit(_save, images, paths, records)
            return
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        self._pending = self._thread.submit(self._decode_and_save, latents, ready, paths, records)

    def _decode_and_save(
        self,
        latents: Tensor,
        ready: torch.cuda.Event | None,
        paths: Sequence[Path],
        records: Sequence[Mapping[str, str]],
    ) -> None:
        with contextlib.ExitStack() as stack:
            if self._stream is not None and ready is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
                self._stream.wait_event(ready)
                latents.record_stream(self._stream)
            images = decode_images(self._models, latents, self._options)
        _save(images, paths, records)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _save(images: Sequence[Image], paths: Sequence[Path], records: Sequence[Mapping[str, str]]) -> None:
    for image, path, record in zip(images, paths, records, strict=True):
        save_png(image, path, record)
