"""All data of a run: records in buckets, the keyed order of every epoch, and the loader of its batches.

An epoch's batches are a function of (seed, epoch). A batch's reference carries everything that its samples depend on,
so a loader worker keeps no state, and an epoch can start at any batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from library.architectures.base import LatentFormat
from library.data.augment import face_in_name
from library.data.batch import Batch
from library.data.buckets import Buckets
from library.data.captions import CaptionRules, Progress
from library.data.conditioning import Role, check_none_is_extra, pair
from library.data.dataset_config import DatasetConfig, DatasetSpec, SubsetSpec
from library.data.discover import Seen, discover
from library.data.effects import warn_of_no_effect
from library.data.latent_cache import Encode, Peers, Wanted, fill
from library.data.loader import BatchMaker, Loader, Tokenize
from library.data.metadata_cache import no_collection
from library.data.order import Order, steps_of_epoch, steps_of_older_states
from library.data.records import ImageRecord
from library.data.same_file import with_one_spelling
from library.data.validation_split import for_validation, split_records
from library.errors import UserError
from library.randomness import permutation

if TYPE_CHECKING:
    from library.training.plan import RunPlan

Size = tuple[int, int]

logger = logging.getLogger(__name__)

__all__ = ["Batch", "BatchRef", "BucketedDataset", "TrainingData", "Use"]


#: most images in an epoch, repeats included; beyond it their order alone would take gigabytes
_MOST_USES = 20_000_000


class Use(NamedTuple):
    """One use of a record in an epoch; a tuple, as there may be millions."""

    record: int
    repeat: int


@dataclass(frozen=True)
class BatchRef:
    """Everything that a batch is made from."""

    dataset: int
    epoch: int
    uses: tuple[Use, ...]
    progress: Progress | None = None  # of the run; ``None`` where it does not matter
    weight: float = 1.0  # of its loss among the batches of its step


#: (subset, its index in the dataset, seen) -> its records; for ``seen`` see ``discover``
Find = Callable[[SubsetSpec, int, "Seen | None"], list[ImageRecord]]


def find_subset(subset: SubsetSpec, index: int, seen: Seen | None) -> list[ImageRecord]:
    """Find a subset's images with their captions and masks. Raises UserError with all that is wrong with them."""
    return pair(subset, discover(subset, index, seen))


def find_records(spec: DatasetSpec, seen: Seen | None = None, find: Find = find_subset) -> list[ImageRecord]:
    """Find the records of all subsets of a dataset, with their conditioning images; for ``seen`` see ``discover``."""
    records: list[ImageRecord] = []
    problems = []
    for index, subset in enumerate(spec.subsets):
        try:
            records += find(subset, index, seen)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    for subset, of_subset in by_subset(spec, records):
        warn_of_no_effect(subset, of_subset)
    return records


def by_subset(spec: DatasetSpec, records: Sequence[ImageRecord]) -> list[tuple[SubsetSpec, list[ImageRecord]]]:
    """Return every subset of a dataset with its records."""
    own: dict[int, list[ImageRecord]] = {}
    for record in records:
        own.setdefault(record.subset, []).append(record)
    return [(subset, own.get(index, [])) for index, subset in enumerate(spec.subsets)]


class BucketedDataset:
    """The training or validation records of one ``[[datasets]]`` table, by bucket."""

    def __init__(self, spec: DatasetSpec, records: list[ImageRecord]) -> None:
        self.spec = spec
        self.records = records
        buckets = Buckets(spec.buckets)
        self.bucket_of = [buckets.assign(record.size) for record in self.records]
        self._check_repeats()
        with no_collection():
            self.uses = self._uses()
            self.uses_by_bucket: dict[Size, list[Use]] = {}
            for use in self.uses:
                self.uses_by_bucket.setdefault(self.bucket_of[use.record], []).append(use)

    def subset(self, record: int) -> SubsetSpec:
        return self.spec.subsets[self.records[record].subset]

    def _check_repeats(self) -> None:
        """Refuse an epoch that does not fit into memory; a longer run needs more epochs, not longer ones."""
        most = max(self.spec.subsets, key=lambda subset: subset.num_repeats)
        if len(self.records) * most.num_repeats <= _MOST_USES:
            return  # the usual case, without counting
        count = self.num_train + self.num_reg
        if count > _MOST_USES:
            raise UserError(
                f"{most.where}: num_repeats {most.num_repeats}: an epoch would have {count:,} images; lower it, and "
                "raise --max_train_epochs"
            )

    def _uses(self) -> list[Use]:
        """Return the uses of an epoch: training images by their repeats, and as many regularization images."""
        train, regularization = [], []
        for index in range(len(self.records)):
            subset = self.subset(index)
            uses = [Use(index, repeat) for repeat in range(subset.num_repeats)]
            (regularization if subset.is_reg else train).extend(uses)
        if not regularization:
            return train
        # repeats first over all images, so that each is used before one is used again
        regularization.sort(key=lambda use: (use.repeat, use.record))
        drawn: list[Use] = []
        rounds = 0
        repeats = max(use.repeat for use in regularization) + 1
        while len(drawn) < len(train):
            drawn += [Use(use.record, use.repeat + rounds * repeats) for use in regularization]
            rounds += 1
        return train + drawn[: len(train)]

    @property
    def num_train(self) -> int:
        """Return the number of training images, repeats included."""
        return self._count(is_reg=False)

    @property
    def num_reg(self) -> int:
        """Return the number of regularization images, repeats included; an epoch uses as many as training images."""
        return self._count(is_reg=True)

    def _count(self, *, is_reg: bool) -> int:
        subsets = (self.spec.subsets[record.subset] for record in self.records)
        return sum(subset.num_repeats for subset in subsets if subset.is_reg == is_reg)

    def batch_count(self) -> int:
        size = self.spec.batch_size
        return sum(-(-len(uses) // size) for uses in self.uses_by_bucket.values())

    def batches(self, seed: int, epoch: int, index: int) -> list[BatchRef]:
        """Return the batches of an epoch, bucket by bucket; only a bucket's last may be short."""
        return [ref for refs, _ in self.batches_by_bucket(seed, epoch, index) for ref in refs]

    def batches_by_bucket(self, seed: int, epoch: int, index: int) -> Iterator[tuple[list[BatchRef], bool]]:
        """For each bucket, its batches of an epoch, and whether the last of them is short."""
        for bucket in sorted(self.uses_by_bucket):
            uses = self.uses_by_bucket[bucket]
            order = permutation(len(uses), seed, "order", epoch, index, bucket[0], bucket[1])
            size = self.spec.batch_size
            chosen = (order[start : start + size] for start in range(0, len(uses), size))
            found = [BatchRef(index, epoch, tuple(uses[i] for i in places)) for places in chosen]
            yield found, len(uses) % size > 0

    def wanted(self, record: int) -> Wanted:
        """Return the latents that this record needs."""
        subset, found = self.subset(record), self.records[record]
        return Wanted(
            found.path,
            found.size,
            self.bucket_of[record],
            self.interpolation(record),
            flip=subset.flip_aug,
            alpha_mask=subset.alpha_mask,
        )

    def interpolation(self, record: int) -> str | None:
        return self.subset(record).resize_interpolation or self.spec.resize_interpolation

    def bucket_counts(self) -> dict[Size, int]:
        """Return the uses in an epoch by bucket (W, H)."""
        return dict(sorted(Counter(self.bucket_of[use.record] for use in self.uses).items()))


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

    def batch_count(self) -> int:
        """Return the number of batches of an epoch, over all processes."""
        return sum(dataset.batch_count() for dataset in self.datasets)

    def batches_per_process(self, world_size: int) -> int:
        return -(-self.batch_count() // world_size)

    def batches(self, epoch: int, *, world_size: int = 1, rank: int = 0, accumulation: int = 1) -> list[BatchRef]:
        """One process's batches of an epoch (counted from 0), in order; see ``library.data.order``.

        Every process gets equally many. What fills the last step is a batch without weight, so that the step is that of
        the images it has.

        Args:
            accumulation: batches of a step in each process.
        """
        by_bucket = (b for index, d in enumerate(self.datasets) for b in d.batches_by_bucket(self.seed, epoch, index))
        if self.order == "by batch":
            rounds = steps_of_older_states(by_bucket, world_size, seed=self.seed, epoch=epoch, again=self._used_again)
            return [batches[rank] for batches in rounds]
        steps = steps_of_epoch(by_bucket, world_size * accumulation, seed=self.seed, epoch=epoch)
        if steps and (missing := -len(steps[-1]) % world_size):
            last = steps[-1]
            weight = (len(last) + missing) / len(last)
            steps[-1] = [replace(ref, weight=weight) for ref in last] + [replace(last[0], weight=0.0)] * missing
        return [ref for step in steps for ref in step[rank::world_size]]

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
