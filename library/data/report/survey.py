"""Check a data set, from the options of a training run to the report.

The code of training finds images, captions, buckets and batches; an error that would end a run becomes a finding
instead.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.arguments import RunOptions
from library.config.rules import DATA_RULES, check
from library.config.work_progress import WorkProgress
from library.data import describe
from library.data.caption_lengths import Measure, length_of_longest, measure_of
from library.data.conditioning import check_none_is_extra, pair
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.dataset_spec import DatasetConfig, SubsetSpec
from library.data.discover import Faults, Seen, discover
from library.data.idle_options import without_effect_on_data
from library.data.image_io import covering_size
from library.data.records import ImageRecord
from library.data.report.findings import BucketRow, Collector, Finding, ImageRow, Report, Severity
from library.data.report.looks import Look, look_at_all
from library.data.report.near_duplicates import equal_files, look_alikes, on_both_sides
from library.data.report.options import CheckOptions, about_data
from library.data.run_plan import RunPlan
from library.data.unread_captions import unread_captions
from library.errors import UserError

if TYPE_CHECKING:
    from library.architectures.base import Architecture

logger = logging.getLogger(__name__)

#: enlargement above which there is a note, and above which there is a warning
ENLARGED, MUCH_ENLARGED = 1.01, 1.25
#: fraction of the area that is cropped off, above which there is a warning
MUCH_CUT = 0.25

#: kinds of the warnings of these modules; of others, settings
_KIND_OF_LOGGER = {"library.data.conditioning": "masks", "library.data.metadata_file": "data"}


def check_data(options: RunOptions, wanted: CheckOptions, architecture: Architecture) -> Report:
    """Collect the whole report.

    Raises:
        UserError: options or a dataset file that are wrong, so that there is nothing to look at.
    """
    options = about_data(options)
    collector, faults = Collector(), Faults()
    images = _Images(faults, collector)
    with _warnings_as_findings(collector):
        for warning in check(options, architecture, rules=DATA_RULES):
            collector.add("settings", "warning", warning)
        config = load_dataset_config(options.dataset.dataset_config, options.dataset, options.validation)
        for warning in without_effect_on_data(options, config):
            collector.add("settings", "warning", warning)
        measure = _measure(options, wanted, architecture, collector)
        data = TrainingData(
            _without_masks(config),
            seed=options.training.seed or 0,
            latent=architecture.latent,
            find=images.find,
        )
        conditioning = _check_masks(config, images, faults, collector)
    for warning in unread_captions(config):
        collector.add("settings", "warning", warning)
    looks, unreadable = look_at_all(images.paths(), WorkProgress("looking at images", "images", simple=True).update)
    _report_faults(faults, unreadable, collector)
    _check_sides(images, data, looks, wanted.hash_distance, collector)
    _check_likeness(images, looks, wanted.hash_distance, collector)
    for path, look in looks.items():
        if look.turned:
            collector.add("turned", "info", "turned or mirrored by EXIF; training turns it upright", [path])
    numbers = {s.where: number for number, dataset in enumerate(config.datasets, start=1) for s in dataset.subsets}
    rows = _image_rows(data, numbers, faults, measure, collector)
    rows = [replace(row, conditioning=conditioning.get(row.path)) for row in rows]
    _check_rows(rows, collector)
    return Report(
        source=config.source,
        findings=collector.findings,
        images=rows,
        buckets=_bucket_rows(data, numbers, rows, collector),
        tags=_tags(data),
        summary=_summary(data, options, len(images.paths()) + len(faults.unreadable)),
        notes=collector.notes,
    )


# ---- finding ----


class _Images:
    """Finds the records of subsets and keeps them by subset."""

    def __init__(self, faults: Faults, collector: Collector) -> None:
        self._faults = faults
        self._collector = collector
        self.by_subset: list[tuple[SubsetSpec, list[ImageRecord]]] = []

    def find(self, subset: SubsetSpec, index: int, seen: Seen | None) -> list[ImageRecord]:
        records: list[ImageRecord] = []
        try:
            records = discover(subset, index, seen, self._faults)
        except UserError as error:  # a metadata file with mistakes
            for line in str(error).splitlines():
                self._collector.add("data", "error", line)
        self.by_subset.append((subset, records))
        return records

    def of(self, where: str) -> list[ImageRecord]:
        """Return the records of the subset at that place."""
        return next(records for subset, records in self.by_subset if subset.where == where)

    def paths(self) -> list[Path]:
        """Return every image once."""
        return list(dict.fromkeys(record.path for _, records in self.by_subset for record in records))


def _without_masks(config: DatasetConfig) -> DatasetConfig:
    """Remove masks: they are checked separately, because one missing mask must not hide all others."""
    datasets = (
        replace(dataset, subsets=tuple(replace(subset, conditioning_dir=None) for subset in dataset.subsets))
        for dataset in config.datasets
    )
    return replace(config, datasets=tuple(datasets))


def _check_masks(
    config: DatasetConfig, images: _Images, faults: Faults, collector: Collector
) -> dict[Path, Path | None]:
    """Report masks and conditioning images that are missing or too many; returns those that belong to images."""
    paired: list[tuple[SubsetSpec, list[ImageRecord]]] = []
    incomplete: set[Path] = set()  # folders of masks that belong to images which were not found
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        if subset.conditioning_dir is None:
            continue
        records = images.of(subset.where)
        if not records or any(path.parent == subset.image_dir for path in faults.unreadable):
            incomplete.add(subset.conditioning_dir)
        try:
            paired.append((subset, pair(subset, records)))
        except UserError as error:
            incomplete.add(subset.conditioning_dir)
            for line in str(error).splitlines():
                collector.add("masks", "error", line)
    try:
        check_none_is_extra((s, records) for s, records in paired if s.conditioning_dir not in incomplete)
    except UserError as error:
        for line in str(error).splitlines():
            collector.add("masks", "error", line)
    return {record.path: record.conditioning for _, records in paired for record in records}


def _report_faults(faults: Faults, unreadable: Mapping[Path, str], collector: Collector) -> None:
    for path, reason in {**faults.unreadable, **unreadable}.items():
        collector.add("unreadable", "error", reason.removeprefix(f"{path}: "), [path])
    for path, reason in faults.captions.items():
        collector.add("data", "error", reason, [path])
    for path, ending in faults.without_caption.items():
        collector.add("caption_missing", "error", f"no {ending} file, and no class_tokens to take instead", [path])


@contextmanager
def _warnings_as_findings(collector: Collector) -> Iterator[None]:
    """Turn warnings of the code that reads data into findings."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                collector.add(_KIND_OF_LOGGER.get(record.name, "settings"), "warning", record.getMessage())

    data_logger, handler = logging.getLogger("library.data"), Handler()
    propagate = data_logger.propagate
    data_logger.addHandler(handler)
    data_logger.propagate = False
    try:
        yield
    finally:
        data_logger.removeHandler(handler)
        data_logger.propagate = propagate


# ---- what images have in common ----


def _sides(images: _Images, data: TrainingData) -> Iterator[tuple[str, list[ImageRecord], list[ImageRecord]]]:
    """Return pairs of image sets that must be disjoint, with a name for each pair."""
    train: list[ImageRecord] = []
    regularization: list[ImageRecord] = []
    for subset, records in images.by_subset:
        (regularization if subset.is_reg else train).extend(records)
    yield "regularization and training", regularization, train
    if data.validation_datasets:
        validation, training = (
            [record for dataset in side for record in dataset.records]
            for side in (data.validation_datasets, data.datasets)
        )
        yield "validation and training", validation, training


def _check_sides(
    images: _Images, data: TrainingData, looks: Mapping[Path, Look], distance: int, collector: Collector
) -> None:
    for name, first, second in _sides(images, data):
        for found in on_both_sides(first, second, looks, distance):
            if found.first == found.second:
                collector.add("leakage", "error", f"{name}: one file on both sides", [found.first])
            elif found.is_equal:
                collector.add("leakage", "error", f"{name}: equal files", [found.first, found.second])
            else:
                text = f"{name}: they look alike ({found.distance} of 128 bits differ)"
                collector.add("leakage", "error", text, [found.first, found.second])


def _check_likeness(images: _Images, looks: Mapping[Path, Look], distance: int, collector: Collector) -> None:
    captions: dict[Path, set[str]] = defaultdict(set)
    places: dict[Path, set[str]] = defaultdict(set)
    for subset, records in images.by_subset:
        for record in records:
            captions[record.path].add(record.caption)
            places[record.path].add(subset.where)
    known = {frozenset(f.images) for f in collector.findings if f.kind == "leakage"}

    def remarks(paths: Sequence[Path]) -> str:
        found = []
        if len({caption for path in paths for caption in captions[path]}) > 1:
            found.append("captions differ")
        if not set.intersection(*(places[path] for path in paths)):
            found.append("in different subsets")
        return "".join(f", {remark}" for remark in found)

    for group in equal_files(looks.values()):
        if frozenset(group) not in known:
            collector.add("duplicate", "warning", f"{len(group)} equal files{remarks(group)}", group)
    for pairs in look_alikes(looks.values(), distance):
        group = list(dict.fromkeys(path for found in pairs for path in (found.first, found.second)))
        if frozenset(group) not in known:
            bits = max(found.distance for found in pairs)
            text = f"{len(group)} images look alike ({bits} of 128 bits differ at most){remarks(group)}"
            collector.add("near_duplicate", "warning", text, group)


# ---- images, captions and buckets ----


def _measure(
    options: RunOptions, wanted: CheckOptions, architecture: Architecture, collector: Collector
) -> Measure | None:
    """Return a function that counts a caption's tokens, if there is a tokenizer."""
    model = options.model
    if wanted.tokenizer is not None:
        tokenizers = architecture.tokenizers_in(wanted.tokenizer, v2=model.v2)
    elif model.pretrained_model_name_or_path:
        checkpoint = architecture.inspect(
            model.pretrained_model_name_or_path,
            v2=model.v2,
            v_parameterization=model.v_parameterization,
            vae=model.vae,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
        )
        architecture = architecture.for_model(checkpoint)
        tokenizers = architecture.load_tokenizers(checkpoint)
    else:
        collector.notes.append(
            "Tokens of captions were not counted, as there was no tokenizer: give --pretrained_model_name_or_path, "
            "or --tokenizer and the folder of one."
        )
        return None
    return measure_of(
        architecture, tokenizers, max_token_length=model.max_token_length, weighted=model.weighted_captions
    )


def _image_rows(
    data: TrainingData, numbers: Mapping[str, int], faults: Faults, measure: Measure | None, collector: Collector
) -> list[ImageRow]:
    longest = length_of_longest(measure) if measure is not None else None
    rows: list[ImageRow] = []
    captions: dict[tuple[Path, str], Finding] = {}  # an image that several datasets use is named once
    for dataset in (*data.datasets, *data.validation_datasets):
        for index, record in enumerate(dataset.records):
            subset, bucket, path = dataset.subset(index), dataset.bucket_of[index], record.path
            resized = covering_size(record.size, bucket)
            tokens = None
            if longest is not None:
                length = longest(record.caption, subset.captions)
                tokens = length.tokens
                if length.cut:
                    note = " (which tags, changes with the order)" if subset.captions.shuffle else ""
                    text = f"{length.tokens} tokens, of which {length.limit} are used{note}; cut off:"
                    captions[path, text] = Finding("caption_too_long", "warning", text, (path,), length.cut)
            if not record.caption.strip() and path not in faults.without_caption and path not in faults.captions:
                captions[path, ""] = Finding("caption_empty", "warning", "the caption is empty", (path,))
            rows.append(
                ImageRow(
                    path=path,
                    dataset=numbers[subset.where],
                    subset=record.subset + 1,
                    size=record.size,
                    bucket=bucket,
                    scale=max(bucket[0] / record.size[0], bucket[1] / record.size[1]),
                    crop_loss=1 - bucket[0] * bucket[1] / (resized[0] * resized[1]),
                    caption=record.caption,
                    tokens=tokens,
                    validation=dataset in data.validation_datasets,
                )
            )
    collector.findings += captions.values()
    return rows


def _check_rows(rows: Sequence[ImageRow], collector: Collector) -> None:
    seen: set[tuple[Path, tuple[int, int]]] = set()
    for row in rows:
        if (row.path, row.bucket) in seen:
            continue
        seen.add((row.path, row.bucket))
        sizes = f"{row.size[0]}x{row.size[1]} for the bucket {row.bucket[0]}x{row.bucket[1]}"
        if row.scale >= ENLARGED:
            severity: Severity = "warning" if row.scale >= MUCH_ENLARGED else "info"
            collector.add("enlarged", severity, f"enlarged {row.scale:.2f} times: {sizes}", [row.path])
        if row.crop_loss >= MUCH_CUT:
            collector.add("crop", "warning", f"{row.crop_loss:.0%} of the area is cut off: {sizes}", [row.path])


def _bucket_rows(
    data: TrainingData, numbers: Mapping[str, int], rows: Sequence[ImageRow], collector: Collector
) -> list[BucketRow]:
    losses: dict[tuple[int, tuple[int, int]], list[float]] = defaultdict(list)
    for row in rows:
        if not row.validation:
            losses[row.dataset, row.bucket].append(row.crop_loss)
    found = []
    for dataset in data.datasets:
        number = numbers[dataset.spec.subsets[0].where]
        batch_size = dataset.spec.batch_size
        for size, uses in dataset.bucket_counts().items():
            lost = losses[number, size]
            batches = -(-uses // batch_size)
            found.append(BucketRow(number, size, len(lost), uses, batches, sum(lost) / len(lost)))
            if len(lost) < batch_size:
                images = "1 image" if len(lost) == 1 else f"{len(lost)} images"
                text = f"dataset {number}: {size[0]}x{size[1]} has {images} for batches of {batch_size}"
                collector.add("buckets", "info", text)
    return found


def _tags(data: TrainingData) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for of_source in describe.tags_by_source(data.datasets).values():
        counts.update(of_source)
    return dict(counts.most_common())


def _summary(data: TrainingData, options: RunOptions, images: int) -> list[tuple[str, str]]:
    rows = [("images", str(images)), *describe.summary_rows(data)]
    batches = data.batches_per_process(1)
    if not batches:
        return rows
    training = options.training
    plan = RunPlan.make(
        batches_per_epoch=batches,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_train_steps=training.max_train_steps,
        max_train_epochs=training.max_train_epochs,
    )
    length = f"{plan.total_steps} steps are {plan.num_epochs} epochs"
    return [*rows, ("steps an epoch", f"{plan.steps_per_epoch} with one process ({batches} batches); {length}")]
