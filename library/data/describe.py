"""Describe a run's data in the published metadata keys, and in lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.data.bucketed import BucketedDataset
from library.data.buckets import mean_aspect_error
from library.data.captions import tags_of
from library.data.dataset import TrainingData
from library.data.dataset_spec import SubsetSpec
from library.data.validation_split import name_of
from library.randomness import key


def metadata(
    data: TrainingData, *, from_file: bool, world_size: int = 1, gradient_accumulation_steps: int = 1
) -> dict[str, Any]:
    """Return ``ss_datasets`` (with a dataset file) or the flat keys (without), and the counts; tables as Python
    values."""
    entries: dict[str, Any] = {
        "ss_num_train_images": sum(d.num_train for d in data.datasets),
        "ss_num_validation_images": sum(len(d.records) for d in data.validation_datasets),
        "ss_num_reg_images": sum(d.num_reg for d in data.datasets),
        "ss_num_batches_per_epoch": data.batches_per_process(world_size),
    }
    dirs: dict[str, dict[str, int]] = {}
    reg_dirs: dict[str, dict[str, int]] = {}
    dir_names, reg_names = _FreeNames(), _FreeNames()
    for dataset in data.datasets:
        counts = Counter(record.subset for record in dataset.records)
        for index, subset in enumerate(dataset.spec.subsets):
            target, names = (reg_dirs, reg_names) if subset.is_reg else (dirs, dir_names)
            if subset.is_reg and from_file:
                continue
            target[names.take(subset.source.name)] = {"n_repeats": subset.num_repeats, "img_count": counts[index]}
    # a folder that several datasets train on, at different sizes, is counted once
    entries |= {"ss_dataset_dirs": dirs, "ss_tag_frequency": _tags_by_name(data.datasets)}
    if from_file:
        entries["ss_datasets"] = [_dataset_entry(dataset) for dataset in data.datasets]
        return entries
    first = data.datasets[0]
    rules, subset = first.spec.buckets, first.spec.subsets[0]
    return entries | {
        "ss_reg_dataset_dirs": reg_dirs,
        "ss_bucket_info": _bucket_info(first),
        "ss_batch_size_per_device": first.spec.batch_size,
        "ss_total_batch_size": first.spec.batch_size * world_size * gradient_accumulation_steps,
        "ss_resolution": rules.resolution,
        "ss_color_aug": subset.color_aug,
        "ss_flip_aug": subset.flip_aug,
        "ss_random_crop": subset.random_crop,
        "ss_shuffle_caption": subset.captions.shuffle,
        "ss_enable_bucket": rules.enabled,
        "ss_bucket_no_upscale": rules.no_upscale,
        "ss_min_bucket_reso": rules.min_side if rules.enabled else None,
        "ss_max_bucket_reso": rules.max_side if rules.enabled else None,
        "ss_keep_tokens": subset.captions.keep_tokens,
    }


class _FreeNames:
    """Names of folders for a table; equal ones get " (2)", " (3)", ..."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: Counter[str] = Counter()

    def take(self, name: str) -> str:
        while True:
            self._counts[name] += 1
            free = name if self._counts[name] == 1 else f"{name} ({self._counts[name]})"
            if free not in self._taken:
                self._taken.add(free)
                return free


def tags_by_source(datasets: Sequence[BucketedDataset]) -> dict[Path, dict[str, int]]:
    """Count the captions of a folder or metadata file that have a tag, in lower case; tags are split as in training."""
    counts: dict[Path, Counter[str]] = {}
    counted: set[tuple[Path, Path]] = set()
    for dataset in datasets:
        for record in dataset.records:
            subset = dataset.spec.subsets[record.subset]
            source = subset.source
            of_source = counts.setdefault(source, Counter())
            if (source, record.path) not in counted:
                counted.add((source, record.path))
                of_source.update(tag.lower() for tag in tags_of(record.caption, subset.captions))
    return {source: dict(of_source) for source, of_source in counts.items()}


def _tags_by_name(datasets: Sequence[BucketedDataset]) -> dict[str, dict[str, int]]:
    names = _FreeNames()
    return {names.take(source.name): tags for source, tags in tags_by_source(datasets).items()}


def _bucket_info(dataset: BucketedDataset) -> dict[str, Any] | None:
    if not dataset.spec.buckets.enabled:
        return None
    counts = dataset.bucket_counts()
    pairs = [(record.size, dataset.bucket_of[index]) for index, record in enumerate(dataset.records)]
    return {
        "buckets": {
            str(index): {"resolution": list(size), "count": count} for index, (size, count) in enumerate(counts.items())
        },
        "mean_img_ar_error": mean_aspect_error(pairs),
    }


def _dataset_entry(dataset: BucketedDataset) -> dict[str, Any]:
    rules = dataset.spec.buckets
    counts = Counter(record.subset for record in dataset.records)
    return {
        "is_dreambooth": dataset.spec.is_dreambooth,
        "batch_size_per_device": dataset.spec.batch_size,
        "num_train_images": dataset.num_train,
        "num_reg_images": dataset.num_reg,
        "resolution": list(rules.resolution),
        "enable_bucket": rules.enabled,
        "min_bucket_reso": rules.min_side if rules.enabled else None,
        "max_bucket_reso": rules.max_side if rules.enabled else None,
        "tag_frequency": _tags_by_name([dataset]),
        "bucket_info": _bucket_info(dataset),
        "resize_interpolation": dataset.spec.resize_interpolation,
        "subsets": [_subset_entry(subset, counts[index]) for index, subset in enumerate(dataset.spec.subsets)],
    }


def _subset_entry(subset: SubsetSpec, count: int) -> dict[str, Any]:
    captions = subset.captions
    entry = {
        "img_count": count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": captions.shuffle,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.wildcards,
        "caption_prefix": captions.prefix,
        "caption_suffix": captions.suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir is not None:
        entry["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        return entry | {"metadata_file": subset.metadata_file.name}
    return entry | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def summary_rows(data: TrainingData) -> list[tuple[str, str]]:
    """Return rows for the table before the first step."""
    rows = []
    for number, dataset in enumerate(data.datasets, start=1):
        name = "data" if len(data.datasets) == 1 else f"data {number}"
        reg = f" and {dataset.num_reg} regularization images" if dataset.num_reg else ""
        rows.append((name, f"{dataset.num_train} images an epoch{reg}, batch size {dataset.spec.batch_size}"))
        sizes = ", ".join(f"{w}x{h}: {count}" for (w, h), count in dataset.bucket_counts().items())
        rows.append(("buckets" if len(data.datasets) == 1 else f"buckets {number}", sizes))
    if data.validation_datasets:
        rows.append(("validation", f"{sum(len(d.records) for d in data.validation_datasets)} images"))
    return rows


def validation_set(data: TrainingData) -> str:
    """Return a short text that differs if other images are held out."""
    names = [part for d in data.validation_datasets for record in d.records for part in name_of(record)]
    return f"{len(names) // 2} ({key(*names):016x})"
