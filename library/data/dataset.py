"""All data of a run: records in buckets, the keyed order of every epoch, and the loader of its batches.

An epoch's batches are a function of (seed, epoch). A batch's reference carries all that its samples depend on,
so a loader worker keeps no state, and an epoch may be entered at any batch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from library.architectures.base import LatentFormat
from library.data.batch import Batch
from library.data.buckets import Buckets
from library.data.cache_format import CachedLatents, cache_path, read_cache
from library.data.captions import final_caption
from library.data.dataset_config import DatasetConfig, DatasetSpec, SubsetSpec
from library.data.discover import discover
from library.data.image_io import fit, read_image
from library.data.latent_cache import Encode, Wanted, encode_all, load_current, to_pixels
from library.data.records import ImageRecord
from library.errors import UserError
from library.randomness import permutation, python_rng, visit_key

Size = tuple[int, int]
Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]

__all__ = ["Batch", "BatchRef", "BucketedDataset", "TrainingData", "Use"]


@dataclass(frozen=True)
class Use:
    """One use of a record in an epoch."""

    record: int
    repeat: int


@dataclass(frozen=True)
class BatchRef:
    """All that a batch is made from."""

    dataset: int
    epoch: int
    uses: tuple[Use, ...]


class BucketedDataset:
    """The records of one ``[[datasets]]`` table, by bucket."""

    def __init__(self, spec: DatasetSpec, format: LatentFormat) -> None:
        self.spec = spec
        self.records: list[ImageRecord] = []
        for index, subset in enumerate(spec.subsets):
            self.records += discover(subset, index)
        buckets = Buckets(spec.buckets)
        self.bucket_of = [buckets.assign(record.size) for record in self.records]
        _check_sizes(spec, set(self.bucket_of), format)
        self.uses = self._uses()
        self.uses_by_bucket: dict[Size, list[Use]] = {}
        for use in self.uses:
            self.uses_by_bucket.setdefault(self.bucket_of[use.record], []).append(use)

    def subset(self, record: int) -> SubsetSpec:
        return self.spec.subsets[self.records[record].subset]

    def _uses(self) -> list[Use]:
        """What an epoch is made of: training pictures by their repeats, as many regularisation pictures."""
        train, regularisation = [], []
        for index in range(len(self.records)):
            subset = self.subset(index)
            uses = [Use(index, repeat) for repeat in range(subset.num_repeats)]
            (regularisation if subset.is_reg else train).extend(uses)
        if not regularisation:
            return train
        # repeats first over all pictures, so that each is used before one is used again
        regularisation.sort(key=lambda use: (use.repeat, use.record))
        drawn: list[Use] = []
        rounds = 0
        repeats = max(use.repeat for use in regularisation) + 1
        while len(drawn) < len(train):
            drawn += [Use(use.record, use.repeat + rounds * repeats) for use in regularisation]
            rounds += 1
        return train + drawn[: len(train)]

    @property
    def num_train(self) -> int:
        return sum(not self.subset(use.record).is_reg for use in self.uses)

    @property
    def num_reg(self) -> int:
        return len(self.uses) - self.num_train

    def batch_count(self) -> int:
        size = self.spec.batch_size
        return sum(-(-len(uses) // size) for uses in self.uses_by_bucket.values())

    def batches(self, seed: int, epoch: int, index: int) -> list[BatchRef]:
        """Batches of an epoch, bucket by bucket; only a bucket's last may be short."""
        found = []
        for bucket in sorted(self.uses_by_bucket):
            uses = self.uses_by_bucket[bucket]
            order = permutation(len(uses), seed, "order", epoch, index, bucket[0], bucket[1])
            for start in range(0, len(uses), self.spec.batch_size):
                chosen = tuple(uses[i] for i in order[start : start + self.spec.batch_size])
                found.append(BatchRef(index, epoch, chosen))
        return found

    def wanted(self, record: int) -> Wanted:
        """The latents that this record needs."""
        subset, found = self.subset(record), self.records[record]
        return Wanted(found.path, found.size, self.bucket_of[record], self.interpolation(record), subset.flip_aug)

    def interpolation(self, record: int) -> str | None:
        return self.subset(record).resize_interpolation or self.spec.resize_interpolation

    def bucket_counts(self) -> dict[Size, int]:
        """Uses in an epoch by bucket (W, H)."""
        return dict(sorted(Counter(self.bucket_of[use.record] for use in self.uses).items()))


def _check_sizes(spec: DatasetSpec, buckets: set[Size], format: LatentFormat) -> None:
    step = format.bucket_step
    where = spec.subsets[0].where.rsplit(" > ", 1)[0]
    if spec.buckets.enabled and spec.buckets.step % step:
        raise UserError(f"{where}: bucket_reso_steps {spec.buckets.step}: must be a multiple of {step}")
    for width, height in buckets:
        if width % step or height % step:
            raise UserError(f"{where}: resolution {width}x{height}: both sides must be multiples of {step}")


class TrainingData:
    """The data of a run, all datasets together.

    Args:
        config: the checked dataset file.
        seed: of the run.
        latent: the family's latent format.
        prior_loss_weight: weight of regularisation pictures.

    Raises:
        UserError: unreadable pictures, missing captions, sizes that do not fit; see ``discover``.
    """

    def __init__(
        self, config: DatasetConfig, *, seed: int, latent: LatentFormat, prior_loss_weight: float = 1.0
    ) -> None:
        self.seed = seed
        self.latent = latent
        self.prior_loss_weight = prior_loss_weight
        self.datasets = tuple(BucketedDataset(spec, latent) for spec in config.datasets)
        self._in_memory: dict[tuple[int, int], CachedLatents] = {}
        self._on_disk = False
        self._loader: DataLoader[Any] | None = None
        self._plan: _Planned | None = None

    def picture_count(self) -> int:
        """Different pictures, over all datasets."""
        return len({record.path for dataset in self.datasets for record in dataset.records})

    # ---- the order ----

    def batch_count(self) -> int:
        """Batches of an epoch, over all processes."""
        return sum(dataset.batch_count() for dataset in self.datasets)

    def batches_per_process(self, world_size: int) -> int:
        return -(-self.batch_count() // world_size)

    def batches(self, epoch: int, *, world_size: int = 1, rank: int = 0) -> list[BatchRef]:
        """One process's batches of an epoch (counted from 0), in order.

        Every process gets equally many; to fill the last round, its first batches are used once more.
        """
        found = [ref for index, d in enumerate(self.datasets) for ref in d.batches(self.seed, epoch, index)]
        order = permutation(len(found), self.seed, "batches", epoch)
        shuffled = [found[i] for i in order]
        missing = -len(shuffled) % world_size
        shuffled += (shuffled * (missing // len(shuffled) + 1))[:missing]
        return shuffled[rank::world_size]

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
    ) -> int:
        """Make the cache complete; returns how many pictures had to be encoded.

        Args:
            encode: called only if there is something to encode; returns the function from pixels (B, 3, H, W)
                and one generator each to latents (B, C, h, w) on the host.
            batch_size: pictures encoded at a time.
            to_disk: keep the latents beside the pictures instead of in memory.
            vae_identity: stamped into files.
            trust: use files without comparing them with picture and VAE.
            report: called with pictures done and their total.
        """
        missing: dict[Wanted, list[tuple[int, int]]] = {}
        for index, dataset in enumerate(self.datasets):
            for record in sorted({use.record for use in dataset.uses}):
                wanted = dataset.wanted(record)
                found = load_current(wanted, self.latent, vae_identity=vae_identity, trust=trust) if to_disk else None
                if found is None:
                    missing.setdefault(wanted, []).append((index, record))
        self._on_disk = to_disk
        if not missing:
            return 0
        made = encode_all(
            list(missing), encode(), self.latent, batch_size=batch_size, to_disk=to_disk, vae_identity=vae_identity
        )
        for done, (wanted, cached) in enumerate(made, start=1):
            if not to_disk:
                for place in missing[wanted]:
                    self._in_memory[place] = cached
            report(done, len(missing))
        return len(missing)

    def _cached(self, dataset: int, record: int) -> CachedLatents | None:
        if not self._on_disk:
            return self._in_memory.get((dataset, record))
        wanted = self.datasets[dataset].wanted(record)
        path = cache_path(wanted.path, wanted.size, self.latent)
        found = read_cache(path, wanted.bucket, self.latent)
        if found is None:
            raise UserError(f"{path}: vanished while training; start again to make it anew")
        return found[0]

    # ---- batches ----

    def make_batch(self, ref: BatchRef, tokenize: Tokenize) -> Batch:
        """Build a batch; runs in a loader worker."""
        samples = [self._sample(ref, use) for use in ref.uses]
        spec = self.datasets[ref.dataset].spec
        captions = [sample.caption for sample in samples]
        latents = [s.latents for s in samples if s.latents is not None]
        images = [s.image for s in samples if s.image is not None]
        return Batch(
            latents=torch.stack(latents) if latents else None,
            images=torch.stack(images) if images else None,
            captions=captions,
            tokens=tokenize(captions),
            visits=[s.visit for s in samples],
            loss_weights=torch.tensor([s.weight for s in samples]),
            paths=[str(s.record.path) for s in samples],
            bucket=self.datasets[ref.dataset].bucket_of[ref.uses[0].record],
            original_sizes=torch.tensor([s.record.size for s in samples]),
            crop_top_lefts=torch.tensor([s.crop_left_top for s in samples]),
            flipped=[s.flipped for s in samples],
            network_multiplier=spec.network_multiplier,
        )

    def _sample(self, ref: BatchRef, use: Use) -> _Sample:
        dataset = self.datasets[ref.dataset]
        record, subset = dataset.records[use.record], dataset.subset(use.record)
        visit = visit_key(self.seed, ref.epoch, ref.dataset, use.record, use.repeat)
        flipped = subset.flip_aug and python_rng(visit, "flip").random() < 0.5
        caption = final_caption(record.caption, subset.captions, epoch=ref.epoch, rng=python_rng(visit, "caption"))
        weight = self.prior_loss_weight if subset.is_reg else 1.0
        cached = self._cached(ref.dataset, use.record) if self._on_disk or self._in_memory else None
        if cached is not None:
            chosen = cached.latents_flipped if flipped else cached.latents
            return _Sample(
                record, visit, caption, weight, flipped, cached.crop_ltrb[:2], torch.from_numpy(np.asarray(chosen)), None
            )
        rng = python_rng(visit, "crop")
        fraction = (rng.random(), rng.random()) if subset.random_crop else (0.5, 0.5)
        fitted = fit(
            read_image(record.path),
            dataset.bucket_of[use.record],
            interpolation=dataset.interpolation(use.record),
            crop_fraction=fraction,
        )
        pixels = to_pixels(fitted.pixels[:, ::-1] if flipped else fitted.pixels)
        return _Sample(record, visit, caption, weight, flipped, fitted.crop_ltrb[:2], None, pixels)

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
    ) -> Iterator[Batch]:
        """The batches of an epoch (counted from 0) from ``start_batch`` on, prepared ahead in workers.

        The settings besides ``epoch`` and ``start_batch`` must be the same for a whole run.
        """
        if self._loader is None:
            # tokenizers warn, and may hang, when their threads meet forked workers
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            self._plan = _Planned()
            self._loader = DataLoader(
                _Batches(self, tokenize),
                batch_size=None,
                sampler=self._plan,
                num_workers=num_workers,
                pin_memory=pin_memory,
                persistent_workers=persistent and num_workers > 0,
            )
        self._plan.refs = self.batches(epoch, world_size=world_size, rank=rank)[start_batch:]
        return iter(self._loader)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are spawned: they need no loader of their own."""
        return {**self.__dict__, "_loader": None, "_plan": None}


@dataclass(frozen=True)
class _Sample:
    record: ImageRecord
    visit: int
    caption: str
    weight: float
    flipped: bool
    crop_left_top: tuple[int, int]
    latents: Tensor | None
    image: Tensor | None


class _Planned(Sampler[BatchRef]):
    """Hands out batch references; the references themselves travel to the workers."""

    def __init__(self) -> None:
        self.refs: list[BatchRef] = []

    def __iter__(self) -> Iterator[BatchRef]:
        return iter(self.refs)

    def __len__(self) -> int:
        return len(self.refs)


class _Batches(Dataset[Batch]):
    """What a worker runs: a reference in, a batch out."""

    def __init__(self, data: TrainingData, tokenize: Tokenize) -> None:
        self._data = data
        self._tokenize = tokenize

    def __getitem__(self, ref: BatchRef) -> Batch:  # type: ignore[override]
        return self._data.make_batch(ref, self._tokenize)
