"""All data of a run: records in buckets, the keyed order of every epoch, and the loader of its batches.

An epoch's batches are a function of (seed, epoch). A batch's reference carries everything that its samples depend on,
so a loader worker keeps no state, and an epoch can start at any batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.architectures.formats import LatentFormat
from library.data.augment import face_in_name
from library.data.batch import Batch
from library.data.bucketed import BatchRef, BucketedDataset, Find, Use, by_subset, find_records, find_subset
from library.data.captions import CaptionRules, Progress
from library.data.conditioning import Role, check_none_is_extra
from library.data.dataset_spec import DatasetConfig, DatasetSpec
from library.data.discover import Seen
from library.data.latent_cache import Encode, Peers, Wanted, fill
from library.data.loader import BatchMaker, Loader, Tokenize
from library.data.order import Order, steps_of_epoch, steps_of_older_states
from library.data.records import ImageRecord
from library.data.same_file import with_one_spelling
from library.data.validation_split import for_validation, split_records
from library.errors import UserError

if TYPE_CHECKING:
    from library.data.run_plan import RunPlan

Size = tuple[int, int]

logger = logging.getLogger(__name__)

__all__ = ["Batch", "BatchRef", "BucketedDataset", "TrainingData", "Use"]


def _check_steps(spec: DatasetSpec, format: LatentFormat) -> None:
    step = format.bucket_step
    where = spec.subsets[0].where.rsplit(" > ", 1)[0]
    if spec.buckets.enabled:
        if spec.buckets.step % step:
            raise UserError(f"{where}: bucket_reso_steps {spec.buckets.step}: must be a multiple of {step}")
        return
    width, height = spec.buckets.resolution
    if width % step or height % step:
        near = f"{max(step, width // step * step)}x{max(step, height // step * step)}"
        raise UserError(f"{where}: resolution {width}x{height}: both sides must be multiples of {step}, such as {near}")


def _check_faces(spec: DatasetSpec, records: Sequence[ImageRecord]) -> None:
    """Name images that cannot be cropped around a face; an error if none of a subset can."""
    problems = []
    for subset, of_subset in by_subset(spec, records):
        if subset.face_crop_range is None or not of_subset:
            continue
        without = [record.path.name for record in of_subset if face_in_name(record.path, record.size) is None]
        if len(without) == len(of_subset):
            problems.append(
                f"{subset.where}: face_crop_aug_range: no image's name tells where the face is; names must end with "
                "_<centre x>_<centre y>_<width>_<height>; or write face_crop_aug_range = [] here"
            )
        elif without:
            logger.warning(
                "%s: face_crop_aug_range: cropped as without it, as their names tell no face: %d images, such as %s",
                *(subset.where, len(without), without[0]),
            )
    if problems:
        raise UserError("\n".join(problems))


class TrainingData:
    """The data of a run, all datasets together.

    ``datasets`` are trained on, ``validation_datasets`` are held out; a dataset is in one of them, or in both with a
    part of its images each.

    Args:
        config: the checked dataset file.
        seed: of the run.
        latent: the family's latent format.
        prior_loss_weight: weight of regularization images.
        conditioning_as: role of the images of ``conditioning_data_dir`` in a batch.
        find: finds the records of a subset.
        order: see ``library.data.order``.

    Raises:
        UserError: unreadable images, missing captions, sizes that do not fit; see ``discover``.
    """

    def __init__(
        self,
        config: DatasetConfig,
        *,
        seed: int,
        latent: LatentFormat,
        prior_loss_weight: float = 1.0,
        conditioning_as: Role = "mask",
        find: Find = find_subset,
        order: Order = "by step",
    ) -> None:
        self.seed = seed
        self.order = order
        self.latent = latent
        self.conditioning_as = conditioning_as
        found, problems = [], []
        seen: Seen = {}
        for spec in config.datasets:
            try:
                found.append(find_records(spec, seen, find))
                _check_steps(spec, latent)
                _check_faces(spec, found[-1])
            except UserError as error:
                problems += str(error).splitlines()
        if problems:
            # a folder that several datasets share is named once
            raise UserError("\n".join(dict.fromkeys(problems)))
        check_none_is_extra(
            s for spec, records in zip(config.datasets, found, strict=True) for s in by_subset(spec, records)
        )
        split = split_records(config.datasets, with_one_spelling(found), seed=seed)
        self.datasets, self.validation_datasets = (
            tuple(BucketedDataset(spec, records) for spec, records in zip(specs, parts, strict=True) if records)
            for specs, parts in (
                (config.datasets, split.training),
                ([for_validation(spec, seed) for spec in config.datasets], split.validation),
            )
        )
        self.maker = BatchMaker(
            self.datasets, seed=seed, prior_loss_weight=prior_loss_weight, conditioning_as=conditioning_as
        )
        self._loader: Loader | None = None

    def image_count(self) -> int:
        """Return the number of different images in different sizes, over all datasets."""
        return len(self._wanted())

    # ---- the order ----

    def batches_per_process(self, world_size: int) -> int:
        """Return the number of batches of an epoch in each process."""
        if self.order == "by batch":
            return -(-sum(dataset.batch_count() for dataset in self.datasets) // world_size)
        return sum(dataset.batch_count(world_size) for dataset in self.datasets)

    def batches(self, epoch: int, *, world_size: int = 1, rank: int = 0, accumulation: int = 1) -> list[BatchRef]:
        """One process's batches of an epoch (counted from 0), in order; see ``library.data.order``.

        Every process gets equally many.

        Args:
            accumulation: batches of a step in each process.
        """
        if self.order == "by batch":
            rounds = steps_of_older_states(
                self._by_bucket(epoch, 1), world_size, seed=self.seed, epoch=epoch, again=self._used_again
            )
            return [batches[rank] for batches in rounds]
        steps = steps_of_epoch(self._by_bucket(epoch, world_size), accumulation, seed=self.seed, epoch=epoch)
        return [ref.share(rank, world_size) for step in steps for ref in step]

    def _by_bucket(self, epoch: int, processes: int) -> Iterator[tuple[list[BatchRef], bool]]:
        for index, dataset in enumerate(self.datasets):
            yield from dataset.batches_by_bucket(self.seed, epoch, index, processes)

    def _used_again(self, ref: BatchRef, turn: int) -> BatchRef:
        repeats = 1 + max(use.repeat for use in self.datasets[ref.dataset].uses)
        return replace(ref, uses=tuple(Use(use.record, use.repeat + turn * repeats) for use in ref.uses))

    # ---- latents ----

    def cache_latents(
        self,
        encode: Callable[[], Encode],
        *,
        batch_size: int,
        to_disk: bool,
        vae_identity: str,
        trust: bool = False,
        report: Callable[[int, int], None] = lambda done, total: None,
        peers: Peers = Peers(),
        pin_memory: bool = False,
    ) -> int:
        """Complete the cache and return how many images had to be encoded. For the arguments see ``fill``."""
        self.maker.latents, made = fill(
            self._wanted(),
            encode,
            self.latent,
            batch_size=batch_size,
            to_disk=to_disk,
            vae_identity=vae_identity,
            trust=trust,
            report=report,
            peers=peers,
            pin_memory=pin_memory,
        )
        return made

    def _wanted(self) -> list[Wanted]:
        """Return what the latent cache must hold; an image that is flipped in one subset only is listed once, with
        both.

        The same goes for its alpha mask.
        """
        merged: dict[Wanted, Wanted] = {}
        for dataset in (*self.datasets, *self.validation_datasets):
            for record in sorted({use.record for use in dataset.uses}):
                wanted = dataset.wanted(record)
                plain = replace(wanted, flip=False, alpha_mask=False)
                known = merged.get(plain, plain)
                merged[plain] = replace(
                    plain, flip=known.flip or wanted.flip, alpha_mask=known.alpha_mask or wanted.alpha_mask
                )
        return list(merged.values())

    def captioned(self) -> Iterator[tuple[ImageRecord, CaptionRules]]:
        """Return every image that is used, for training or validation, with the rules of its caption."""
        for dataset in (*self.datasets, *self.validation_datasets):
            for record in sorted({use.record for use in dataset.uses}):
                yield dataset.records[record], dataset.subset(record).captions

    # ---- batches ----

    def dataloader(
        self,
        *,
        epoch: int,
        start_batch: int,
        tokenize: Tokenize,
        num_workers: int,
        pin_memory: bool = False,
        persistent: bool = False,
        rank: int = 0,
        world_size: int = 1,
        plan: RunPlan | None = None,
    ) -> Iterator[Batch]:
        """Return the batches of an epoch (counted from 0) from ``start_batch`` on, prepared ahead in workers.

        The settings besides ``epoch`` and ``start_batch`` must be the same for a whole run. ``plan`` gives the step of
        a batch, for the tag warm-up; without it, the warm-up counts as over.

        Raises:
            UserError: while iterating: an image or cache file that cannot be read; a worker that was killed.
        """
        if self._loader is None:
            workers = min(num_workers, self.batches_per_process(world_size))
            self._loader = Loader(
                self.maker, tokenize, num_workers=workers, pin_memory=pin_memory, persistent=persistent
            )
        accumulation = 1 if plan is None else plan.gradient_accumulation_steps
        refs = self.batches(epoch, world_size=world_size, rank=rank, accumulation=accumulation)
        if plan is not None:
            refs = [
                replace(ref, progress=Progress(plan.step_of(epoch, index), plan.total_steps))
                for index, ref in enumerate(refs)
            ]
        return self._loader.batches(refs[start_batch:])
