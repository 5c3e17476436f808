"""The records of a dataset in their buckets, and the keyed order of an epoch's batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from library.data.buckets import Buckets
from library.data.captions import Progress
from library.data.conditioning import pair
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.discover import Seen, discover
from library.data.effects import warn_of_no_effect
from library.data.latent_cache import Wanted
from library.data.metadata_cache import no_collection
from library.data.records import ImageRecord
from library.errors import UserError
from library.randomness import permutation

Size = tuple[int, int]

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
    weight: float = 1.0  # of its loss among those of the other processes

    def share(self, rank: int, world_size: int) -> BatchRef:
        """Return the part of one process, weighted so that the mean over processes is that over images.

        A process without an image gets one of the others' without weight, as all must compute something.
        """
        if world_size == 1:
            return self
        count = len(self.uses)
        uses = self.uses[rank * count // world_size : (rank + 1) * count // world_size]
        return replace(self, uses=uses or self.uses[:1], weight=len(uses) * world_size / count)


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
        train: list[Use] = []
        regularization: list[Use] = []
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

    def batch_count(self, processes: int = 1) -> int:
        """Return the number of batches of an epoch, each shared by all processes."""
        size = self.spec.batch_size * processes
        return sum(-(-len(uses) // size) for uses in self.uses_by_bucket.values())

    def batches(self, seed: int, epoch: int, index: int) -> list[BatchRef]:
        """Return the batches of an epoch, bucket by bucket; only a bucket's last may be short."""
        return [ref for refs, _ in self.batches_by_bucket(seed, epoch, index) for ref in refs]

    def batches_by_bucket(
        self, seed: int, epoch: int, index: int, processes: int = 1
    ) -> Iterator[tuple[list[BatchRef], bool]]:
        """Yield each bucket's batches of an epoch, each for all processes, and whether the last of them is short."""
        for bucket in sorted(self.uses_by_bucket):
            uses = self.uses_by_bucket[bucket]
            order = permutation(len(uses), seed, "order", epoch, index, bucket[0], bucket[1])
            size = self.spec.batch_size * processes
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
