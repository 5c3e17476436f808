"""Find data options without effect because of a dataset file: its tables have their own values, or nothing reads
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.arguments import RunOptions, flat
from library.config.declaration import message
from library.config.no_effect import given
from library.data.dataset_config import number_range, parse_size
from library.data.dataset_spec import DatasetConfig, DatasetSpec, SubsetSpec
from library.errors import NoEffect

Read = Callable[[DatasetSpec, SubsetSpec], Any]


@dataclass(frozen=True)
class _DataOption:
    """An option that is the default of a key in the dataset file.

    Attributes:
        in_force: the value of a subset.
        taken_as: the option's value in that form.
        acts: whether a value in force has an effect there, and ``reason`` if not.
    """

    in_force: Read
    taken_as: Callable[[Any], Any] = lambda value: value
    acts: Callable[[DatasetSpec, SubsetSpec], object] = lambda dataset, subset: True
    reason: str = ""


def _with_buckets(in_force: Read) -> _DataOption:
    return _DataOption(in_force, acts=lambda d, s: d.buckets.enabled, reason="without --enable_bucket")


def _with_bounds(in_force: Read) -> _DataOption:
    return _DataOption(
        in_force,
        acts=lambda d, s: d.buckets.enabled and not d.buckets.no_upscale,
        reason="without --enable_bucket, or with --bucket_no_upscale, whose buckets are the images' own sizes",
    )


def _tags_are_arranged(dataset: DatasetSpec, subset: SubsetSpec) -> bool:
    rules = subset.captions
    return rules.shuffle or rules.tag_dropout_rate > 0 or rules.warmup_step > 0


def _has_caption_files(dataset: DatasetSpec, subset: SubsetSpec) -> bool:
    return subset.metadata_file is None


def _ending(value: str) -> str:
    return value if value.startswith(".") or not value else f".{value}"


_CAPTION_FILES = _DataOption(
    lambda d, s: s.caption_extension, _ending, _has_caption_files, "with metadata files, which hold the captions"
)

#: option -> its place in the dataset file's tables
OPTIONS: dict[str, _DataOption] = {
    "train_batch_size": _DataOption(lambda d, s: d.batch_size),
    "resolution": _DataOption(lambda d, s: d.buckets.resolution, parse_size),
    "enable_bucket": _DataOption(lambda d, s: d.buckets.enabled),
    "min_bucket_reso": _with_bounds(lambda d, s: d.buckets.min_side),
    "max_bucket_reso": _with_bounds(lambda d, s: d.buckets.max_side),
    "bucket_reso_steps": _with_buckets(lambda d, s: d.buckets.step),
    "bucket_no_upscale": _with_buckets(lambda d, s: d.buckets.no_upscale),
    "resize_interpolation": _DataOption(lambda d, s: s.resize_interpolation),
    "dataset_repeats": _DataOption(lambda d, s: s.num_repeats),
    "cache_info": _DataOption(lambda d, s: s.cache_info, acts=_has_caption_files, reason="with metadata files"),
    "flip_aug": _DataOption(lambda d, s: s.flip_aug),
    "random_crop": _DataOption(lambda d, s: s.random_crop),
    "face_crop_aug_range": _DataOption(lambda d, s: s.face_crop_range, number_range),
    "color_aug": _DataOption(lambda d, s: s.color_aug),
    "alpha_mask": _DataOption(lambda d, s: s.alpha_mask),
    "conditioning_data_dir": _DataOption(lambda d, s: s.conditioning_dir, Path),
    "caption_extension": _CAPTION_FILES,
    "caption_extention": _CAPTION_FILES,
    "shuffle_caption": _DataOption(lambda d, s: s.captions.shuffle),
    "keep_tokens": _DataOption(
        lambda d, s: s.captions.keep_tokens,
        acts=_tags_are_arranged,
        reason="without --shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step",
    ),
    "keep_tokens_separator": _DataOption(lambda d, s: s.captions.keep_tokens_separator),
    "secondary_separator": _DataOption(lambda d, s: s.captions.secondary_separator),
    "caption_separator": _DataOption(
        lambda d, s: s.captions.separator,
        acts=lambda d, s: (
            _tags_are_arranged(d, s) or s.captions.keep_tokens_separator or s.captions.secondary_separator
        ),
        reason="without an option that shuffles, drops, keeps or joins tags",
    ),
    "caption_prefix": _DataOption(lambda d, s: s.captions.prefix),
    "caption_suffix": _DataOption(lambda d, s: s.captions.suffix),
    "enable_wildcard": _DataOption(lambda d, s: s.captions.wildcards),
    "caption_dropout_rate": _DataOption(lambda d, s: s.captions.dropout_rate),
    "caption_dropout_every_n_epochs": _DataOption(lambda d, s: s.captions.dropout_every_n_epochs),
    "caption_tag_dropout_rate": _DataOption(lambda d, s: s.captions.tag_dropout_rate),
    "token_warmup_step": _DataOption(lambda d, s: s.captions.warmup_step),
    "validation_split": _DataOption(lambda d, s: s.validation_split),
    "token_warmup_min": _DataOption(
        lambda d, s: s.captions.warmup_min,
        acts=lambda d, s: s.captions.warmup_step > 0,
        reason="without --token_warmup_step",
    ),
}

#: reasons why an option is nowhere in force
OWN_VALUES = "with this dataset file: its tables have their own values"
NO_REGULARISATION = "without regularization images"
NO_VALIDATION = "without validation images; set validation_split in the dataset file, or --validation_split"

#: options that nothing reads without validation
ON_VALIDATION = ("validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")


def without_effect_on_data(options: RunOptions, config: DatasetConfig) -> list[NoEffect]:
    """Return one warning for each reason why given data options have no effect.

    An option with the same value as the file's tables is not reported.
    """
    pairs = [(dataset, subset) for dataset in config.datasets for subset in dataset.subsets]
    changed = given(options)
    found: dict[str, list[str]] = {}
    for field, value in flat(options):
        option = OPTIONS.get(field.name)
        if option is None or field.name not in changed:
            continue
        taken = option.taken_as(value)
        in_force = [(d, s) for d, s in pairs if option.in_force(d, s) == taken]
        if not in_force:
            why = OWN_VALUES if options.dataset.dataset_config else "with these folders, whose names set it"
            # the old spelling is given beside the new one and wins, which another rule reports
            if field.name != "caption_extension" or not options.dataset.caption_extention:
                found.setdefault(why, []).append(field.name)
        elif not any(option.acts(d, s) for d, s in in_force):
            found.setdefault(option.reason, []).append(field.name)
    if "prior_loss_weight" in changed and not any(subset.is_reg for _, subset in pairs):
        found.setdefault(NO_REGULARISATION, []).append("prior_loss_weight")
    if not config.validates and (names := [name for name in ON_VALIDATION if name in changed]):
        found[NO_VALIDATION] = names
    return [NoEffect(message(names, reason)) for reason, names in found.items()]
