"""Make batches from their references, in worker processes.

A reference holds everything that its batch depends on and is sent to the worker. So a worker keeps no state, cannot be
out of step, and can live for the whole run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from library.data.augment import Placement, around_face, at_random, face_in_name, in_the_middle, vary_colours
from library.data.batch import Batch
from library.data.bucketed import BatchRef, BucketedDataset, Use
from library.data.captions import final_caption
from library.data.conditioning import Role
from library.data.dataset_spec import SubsetSpec
from library.data.image_io import cut, cut_mask, read_image, read_image_and_alpha
from library.data.latent_cache import DiskLatents, MemoryLatents, to_pixels, to_weights
from library.data.parcel import Parcel
from library.data.records import ImageRecord
from library.data.text_cache import CachedTexts, stack_rows
from library.data.text_cache_format import Row
from library.errors import UserError
from library.randomness import python_rng, visit_key

#: seconds between two checks of a worker whether the main process still exists
_PARENT_CHECK = 1.0

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]


class BatchMaker:
    """Makes batches of a run's datasets; it is sent to spawned workers.

    Args:
        seed: of the run.
        prior_loss_weight: weight of regularization images.
        conditioning_as: whether conditioning images are loss weights, or part of the batch.
    """

    def __init__(
        self,
        datasets: Sequence[BucketedDataset],
        *,
        seed: int,
        prior_loss_weight: float,
        conditioning_as: Role = "mask",
    ) -> None:
        self._datasets = datasets
        self._seed = seed
        self._prior_loss_weight = prior_loss_weight
        self._conditioning_as = conditioning_as
        #: cached latents; without them images are read
        self.latents: DiskLatents | MemoryLatents | None = None
        #: cached text encoder outputs; without them captions are tokenized
        self.texts: CachedTexts | None = None

    def make(self, ref: BatchRef, tokenize: Tokenize) -> Batch:
        """Read, crop, mirror and caption the samples of one batch.

        Raises:
            UserError: an image or cache file that cannot be read.
        """
        samples = [self._sample(ref, use) for use in ref.uses]
        spec = self._datasets[ref.dataset].spec
        captions = [sample.caption for sample in samples]
        latents = [s.latents for s in samples if s.latents is not None]
        images = [s.image for s in samples if s.image is not None]
        conditioning = [s.conditioning for s in samples if s.conditioning is not None]
        texts = [s.text for s in samples if s.text is not None]
        bucket = self._datasets[ref.dataset].bucket_of[ref.uses[0].record]
        return Batch(
            latents=torch.stack(latents) if latents else None,
            images=torch.stack(images) if images else None,
            loss_masks=_stack_masks([s.loss_mask for s in samples], bucket),
            conditioning_images=torch.stack(conditioning) if conditioning else None,
            captions=captions,
            tokens=tokenize(captions) if self.texts is None or self.texts.in_part else {},
            visits=[s.visit for s in samples],
            loss_weights=torch.tensor([s.weight * ref.weight for s in samples]),
            paths=[str(s.record.path) for s in samples],
            bucket=bucket,
            original_sizes=torch.tensor([s.record.size[::-1] for s in samples]),
            crop_top_lefts=torch.tensor([s.crop_top_left for s in samples]),
            flipped=[s.flipped for s in samples],
            network_multiplier=spec.network_multiplier,
            text=None
            if self.texts is None
            else stack_rows(texts, [s.record.path for s in samples], self.texts.store.ragged),
            custom_attributes=[self._datasets[ref.dataset].subset(use.record).custom_attributes for use in ref.uses],
        )

    def visit(self, ref: BatchRef, use: Use) -> int:
        """Return the key of everything random about a sample."""
        return visit_key(self._seed, ref.epoch, ref.dataset, use.record, use.repeat)

    def _sample(self, ref: BatchRef, use: Use) -> _Sample:
        dataset = self._datasets[ref.dataset]
        record, subset, bucket = dataset.records[use.record], dataset.subset(use.record), dataset.bucket_of[use.record]
        visit = self.visit(ref, use)
        flipped = subset.flip_aug and python_rng(visit, "flip").random() < 0.5
        text = None
        if self.texts is not None:
            caption, text = self.texts.sample(record, subset.captions, epoch=ref.epoch, visit=visit)
        else:
            caption = final_caption(
                record.caption,
                subset.captions,
                epoch=ref.epoch,
                rng=python_rng(visit, "caption"),
                progress=ref.progress,
            )
        weight = self._prior_loss_weight if subset.is_reg else 1.0
        latents = pixels = alpha = None
        if self.latents is not None:
            placement = in_the_middle(record.size, bucket)
            stored = self.latents.get(dataset.wanted(use.record), flipped=flipped)
            latents, alpha = stored.latents, stored.alpha_mask
        else:
            placement = _place(record, bucket, subset, visit)
            pixels, alpha = _read_pixels(record, placement, subset, dataset.interpolation(use.record), visit, flipped)
        conditioning = mask = None
        if record.conditioning is not None:
            conditioning, mask = self._read_conditioning(record.conditioning, placement, flipped)
        left, top, right, _ = placement.box
        if flipped:
            left = placement.resized[0] - right
        return _Sample(
            record=record,
            visit=visit,
            caption=caption,
            text=text,
            weight=weight,
            flipped=flipped,
            crop_top_left=(top, left),
            latents=latents,
            image=pixels,
            loss_mask=alpha if mask is None else mask if alpha is None else mask * alpha,
            conditioning=conditioning,
        )

    def _read_conditioning(
        self, path: Path, placement: Placement, flipped: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Read the image as model input (3, H, W) or as weights (H, W), as the trainer needs it.

        It is stretched to the size of its resized image. Transparent pixels become black, which is weight 0.
        """
        pixels = read_image(path, background="black")
        if self._conditioning_as == "mask":
            red = cut_mask(np.ascontiguousarray(pixels[:, :, 0]), placement.resized, placement.box)
            return None, _weights(red, flipped)
        pixels = cut(pixels, placement.resized, placement.box, None)
        return to_pixels(pixels[:, ::-1] if flipped else pixels), None


def _place(record: ImageRecord, bucket: tuple[int, int], subset: SubsetSpec, visit: int) -> Placement:
    """Return the crop of this use of an image; keyed by the visit."""
    rng = python_rng(visit, "crop")
    face = face_in_name(record.path, record.size) if subset.face_crop_range is not None else None
    if face is not None and subset.face_crop_range is not None:
        return around_face(record.size, bucket, face, subset.face_crop_range, rng, moves=subset.random_crop)
    return at_random(record.size, bucket, rng) if subset.random_crop else in_the_middle(record.size, bucket)


def _read_pixels(
    record: ImageRecord,
    placement: Placement,
    subset: SubsetSpec,
    interpolation: str | None,
    visit: int,
    flipped: bool,
) -> tuple[Tensor, Tensor | None]:
    """Read the image (3, H, W) in [-1, 1] and, if needed, its opacity (H, W) in [0, 1]."""
    alpha = None
    if subset.alpha_mask:
        pixels, alpha = read_image_and_alpha(record.path)
    else:
        pixels = read_image(record.path)
    pixels = cut(pixels, placement.resized, placement.box, interpolation)
    if subset.color_aug:
        pixels = vary_colours(pixels, python_rng(visit, "colour"))
    image = to_pixels(pixels[:, ::-1] if flipped else pixels)
    if alpha is None:
        return image, None
    return image, _weights(cut_mask(alpha, placement.resized, placement.box), flipped)


def _weights(mask: np.ndarray, flipped: bool) -> Tensor:
    """uint8 (H, W) -> float32 (H, W) in [0, 1], mirrored with its image."""
    return to_weights(np.ascontiguousarray(mask[:, ::-1]) if flipped else mask)


def _stack_masks(masks: Sequence[Tensor | None], bucket: tuple[int, int]) -> Tensor | None:
    """Stack masks to (B, H, W); samples without a mask count in full, and a batch without masks needs none."""
    if all(mask is None for mask in masks):
        return None
    full = torch.ones(bucket[1], bucket[0])
    return torch.stack([full if mask is None else mask for mask in masks])


@dataclass(frozen=True)
class _Sample:
    record: ImageRecord
    visit: int
    caption: str
    text: Row | None
    weight: float
    flipped: bool
    crop_top_left: tuple[int, int]
    latents: Tensor | None
    image: Tensor | None
    loss_mask: Tensor | None
    conditioning: Tensor | None


class Loader:
    """Yields batches in a given order, prepared ahead by ``num_workers`` processes, or in this process if that is 0."""

    def __init__(
        self, maker: BatchMaker, tokenize: Tokenize, *, num_workers: int, pin_memory: bool, persistent: bool
    ) -> None:
        # tokenizers warn, and may hang, when their threads meet forked workers
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._order = _Order()
        self._loader: DataLoader[Batch | Parcel[Batch] | _Failure] = DataLoader(
            _Batches(maker, tokenize),
            batch_size=None,
            sampler=self._order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent and num_workers > 0,
            worker_init_fn=_start_worker,
            # its own, so that the loader draws nothing from the global generator
            generator=torch.Generator(),
        )

    def batches(self, refs: Sequence[BatchRef]) -> Iterator[Batch]:
        """Yield the batches; work on them starts at once, before the first is requested.

        Raises:
            UserError: while iterating: an image or cache file that cannot be read; a worker that was killed.
        """
        self._order.refs = refs
        return _delivered(iter(self._loader))


def _delivered(loaded: Iterator[Batch | Parcel[Batch] | _Failure]) -> Iterator[Batch]:
    try:
        for batch in loaded:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch.unpack() if isinstance(batch, Parcel) else batch
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}; often memory is short: lower --max_data_loader_n_workers") from error
    finally:
        del loaded  # ends the workers now, not when an error's traceback is freed


class _Order(Sampler["BatchRef"]):
    """Yields references; replaced for every epoch."""

    def __init__(self) -> None:
        self.refs: Sequence[BatchRef] = ()

    def __iter__(self) -> Iterator[BatchRef]:
        return iter(self.refs)

    def __len__(self) -> int:
        return len(self.refs)


class _Batches(Dataset["Batch | Parcel[Batch] | _Failure"]):
    """The worker's function: a reference in, a batch out."""

    def __init__(self, maker: BatchMaker, tokenize: Tokenize) -> None:
        self._maker = maker
        self._tokenize = tokenize

    def __getitem__(self, ref: BatchRef) -> Batch | Parcel[Batch] | _Failure:
        try:
            batch = self._maker.make(ref, self._tokenize)
        except UserError as error:
            return _Failure(str(error))
        return batch if get_worker_info() is None else Parcel(batch)


@dataclass(frozen=True)
class _Failure:
    """A UserError from a worker; raised there, it would arrive inside a traceback."""

    message: str


def _start_worker(index: int) -> None:
    """Ignore signals in workers: after Ctrl-C the main process still needs them to finish the step."""
    threading.Thread(target=_end_with_main, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # not in the process group that signals are sent to


def _end_with_main() -> None:
    """End this worker when the main process ends, in whatever way.

    A killed process cannot end its workers, and each of them keeps the pipes open that the others wait for.
    """
    main = multiprocessing.parent_process()
    if main is None:
        return
    if sys.platform == "win32" or os.getppid() != main.pid:  # there a parent's number stays; or a server forked it
        main.join()
    else:
        while os.getppid() == main.pid:
            time.sleep(_PARENT_CHECK)
    os._exit(1)
