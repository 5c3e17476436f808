"""Choose the held-out images of validation: a keyed choice of files, none of which is trained on.

The choice is a function of (seed, folder's name, image's name): it is the same on every rank and in a resumed run, and
adding an image changes it by one image at most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from library.data.captions import CaptionRules
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.records import ImageRecord
from library.data.same_file import same_file
from library.errors import UserError
from library.randomness import key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Records of each dataset, in the datasets' order; either may be empty."""

    training: tuple[list[ImageRecord], ...]
    validation: tuple[list[ImageRecord], ...]


def split_records(specs: Sequence[DatasetSpec], found: Sequence[list[ImageRecord]], *, seed: int) -> Split:
    """Hold out each dataset's fraction, counted in files.

    The images of a dataset whose subsets have the same fraction are split together, so that many small folders give no
    more than one large one. A held-out file is trained on nowhere, whatever paths lead to it.

    Args:
        found: the records of each dataset.
        seed: of the run, for datasets without ``validation_seed``.

    Raises:
        UserError: nothing is left to train on, or nothing to validate on.
    """
    if not any(subset.validation_split > 0 for spec in specs for subset in spec.subsets):
        return Split(tuple(found), tuple([] for _ in found))
    files = [[same_file(record.path) for record in records] for records in found]
    chosen = [
        _chosen(spec, records, of_dataset, seed_of(spec, seed))
        for spec, records, of_dataset in zip(specs, found, files, strict=True)
    ]
    held = {file for of_dataset in chosen for _, file in of_dataset}
    training, validation = [], []
    seen: set[Hashable] = set()
    for spec, records, of_dataset, own in zip(specs, found, files, chosen, strict=True):
        images = list(zip(records, of_dataset, strict=True))
        _name_the_lost(spec, [r for r, file in images if file in held and (_share(spec, r), file) not in own])
        training.append(_without_lone_regularization(spec, [r for r, file in images if file not in held]))
        validation.append(_each_once(spec, [images[place] for place in sorted(own.values())], seen))
    where = specs[0].subsets[0].where.rpartition(": [[")[0]
    if not held:
        raise UserError(f"{where}: validation_split: of a single image no share can be kept; add images")
    if not any(training):
        raise UserError(f"{where}: validation_split: all images are validated on; nothing is left to train on")
    return Split(tuple(training), tuple(validation))


def seed_of(spec: DatasetSpec, run_seed: int) -> int:
    """Return the seed of a dataset's validation: its own, else the run's."""
    return run_seed if spec.validation_seed is None else spec.validation_seed


def count_of(total: int, share: float) -> int:
    """Return how many of ``total`` files are held out: the nearest number, and at least one on either side.

    A fraction of 1 is all of them; with any other fraction a single file stays in training.
    """
    if share <= 0 or share >= 1:
        return total if share >= 1 else 0
    return min(max(1, math.floor(total * share + 0.5)), total - 1)


def for_validation(spec: DatasetSpec, run_seed: int) -> DatasetSpec:
    """Return the dataset without augmentation and caption changes; wildcards and templates are resolved once for each
    image."""
    return replace(
        spec,
        subsets=tuple(_plain(subset) for subset in spec.subsets),
        validation_seed=seed_of(spec, run_seed),
    )


def _plain(subset: SubsetSpec) -> SubsetSpec:
    rules = subset.captions
    captions = CaptionRules(
        prefix=rules.prefix,
        suffix=rules.suffix,
        separator=rules.separator,
        secondary_separator=rules.secondary_separator,
        keep_tokens=rules.keep_tokens,
        keep_tokens_separator=rules.keep_tokens_separator,
        wildcards=rules.wildcards,
        templates=rules.templates,
    )
    return replace(
        subset,
        num_repeats=1,
        captions=captions,
        flip_aug=False,
        random_crop=False,
        face_crop_range=None,
        color_aug=False,
    )


def _share(spec: DatasetSpec, record: ImageRecord) -> float:
    return spec.subsets[record.subset].validation_split


def _chosen(
    spec: DatasetSpec, records: Sequence[ImageRecord], files: Sequence[Hashable], seed: int
) -> dict[tuple[float, Hashable], int]:
    """Return the indices of records by (fraction, file): the first record of each file."""
    by_share: dict[float, dict[Hashable, int]] = {}
    for place, (record, file) in enumerate(zip(records, files, strict=True)):
        if (share := _share(spec, record)) > 0:
            by_share.setdefault(share, {}).setdefault(file, place)
    places: dict[tuple[float, Hashable], int] = {}
    for share, pool in by_share.items():
        # the lowest keyed numbers: one more image moves the border by at most one place
        ranked = sorted(pool, key=lambda file: (_rank(seed, records[pool[file]]), pool[file]))
        places |= {(share, file): pool[file] for file in ranked[: count_of(len(pool), share)]}
    return places


def _rank(seed: int, record: ImageRecord) -> int:
    return key(seed, "validation split", *name_of(record))


def name_of(record: ImageRecord) -> tuple[str, str]:
    """Return an image's name in keys: it stays when images are added, or the folder is moved."""
    return record.folder.name, record.name


def _name_the_lost(spec: DatasetSpec, lost: Sequence[ImageRecord]) -> None:
    for index, subset in enumerate(spec.subsets):
        names = [record.name for record in lost if record.subset == index]
        if names:
            logger.warning(
                "%s: left out of training, as another subset validates on the same files: %d images, such as %s",
                *(subset.where, len(names), names[0]),
            )


def _without_lone_regularization(spec: DatasetSpec, records: list[ImageRecord]) -> list[ImageRecord]:
    """Return no records where only regularization images are left: an epoch uses as many as there are others."""
    if all(spec.subsets[record.subset].is_reg for record in records):
        if records:
            logger.warning(
                "%s: all of its images are validated on, so that its regularization images are left out",
                spec.subsets[0].where.rsplit(" > ", 1)[0],
            )
        return []
    return records


def _each_once(
    spec: DatasetSpec, images: Sequence[tuple[ImageRecord, Hashable]], seen: set[Hashable]
) -> list[ImageRecord]:
    """Return records whose file was not held out before at the same sizes."""
    kept = []
    for record, file in images:
        if (file, spec.buckets) not in seen:
            seen.add((file, spec.buckets))
            kept.append(record)
    if len(kept) < len(images):
        logger.info(
            "%s: %d of its validation images are validated on in another subset, and are not counted twice",
            *(spec.subsets[0].where.rsplit(" > ", 1)[0], len(images) - len(kept)),
        )
    return kept
