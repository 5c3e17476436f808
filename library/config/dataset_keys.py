"""The keys of a dataset file: their levels, their kinds of values, and the options that they fall back to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_EVERYWHERE = (GENERAL, DATASET, SUBSET)
_OF_DATASET = (GENERAL, DATASET)


@dataclass(frozen=True)
class Key:
    kind: str  # one of CHECKS
    levels: tuple[str, ...]
    flag: str | None = None  # option that holds the command line's value
    default: Any = None


KEYS: dict[str, Key] = {
    "resolution": Key("size", _OF_DATASET, "resolution"),
    "batch_size": Key("positive", _OF_DATASET, "train_batch_size"),
    "enable_bucket": Key("bool", _OF_DATASET, "enable_bucket"),
    "min_bucket_reso": Key("positive", _OF_DATASET, "min_bucket_reso"),
    "max_bucket_reso": Key("positive", _OF_DATASET, "max_bucket_reso"),
    "bucket_reso_steps": Key("positive", _OF_DATASET, "bucket_reso_steps"),
    "bucket_no_upscale": Key("bool", _OF_DATASET, "bucket_no_upscale"),
    "network_multiplier": Key("number", _OF_DATASET, None, 1.0),
    "resize_interpolation": Key("interpolation", _EVERYWHERE, "resize_interpolation"),
    "cache_info": Key("bool", _EVERYWHERE, "cache_info"),
    "num_repeats": Key("int", _EVERYWHERE, "dataset_repeats"),
    "flip_aug": Key("bool", _EVERYWHERE, "flip_aug"),
    "random_crop": Key("bool", _EVERYWHERE, "random_crop"),
    "face_crop_aug_range": Key("range", _EVERYWHERE, "face_crop_aug_range"),
    "color_aug": Key("bool", _EVERYWHERE, "color_aug"),
    "alpha_mask": Key("bool", (SUBSET,), "alpha_mask"),
    "conditioning_data_dir": Key("str", (SUBSET,), "conditioning_data_dir"),
    "shuffle_caption": Key("bool", _EVERYWHERE, "shuffle_caption"),
    "keep_tokens": Key("natural", _EVERYWHERE, "keep_tokens"),
    "keep_tokens_separator": Key("str", _EVERYWHERE, "keep_tokens_separator"),
    "secondary_separator": Key("str", _EVERYWHERE, "secondary_separator"),
    "caption_separator": Key("text", _EVERYWHERE, "caption_separator"),
    "caption_extension": Key("text", _EVERYWHERE, "caption_extension"),
    "caption_prefix": Key("str", _EVERYWHERE, "caption_prefix"),
    "caption_suffix": Key("str", _EVERYWHERE, "caption_suffix"),
    "enable_wildcard": Key("bool", _EVERYWHERE, "enable_wildcard"),
    "caption_dropout_rate": Key("share", _EVERYWHERE, "caption_dropout_rate"),
    "caption_dropout_every_n_epochs": Key("natural", _EVERYWHERE, "caption_dropout_every_n_epochs"),
    "caption_tag_dropout_rate": Key("share", _EVERYWHERE, "caption_tag_dropout_rate"),
    "custom_attributes": Key("table", _EVERYWHERE),
    "class_tokens": Key("str", _EVERYWHERE),
    "is_reg": Key("bool", (SUBSET,), None, False),
    "image_dir": Key("str", (SUBSET,)),
    "metadata_file": Key("text", (SUBSET,)),
    "token_warmup_step": Key("amount", _EVERYWHERE, "token_warmup_step"),
    "token_warmup_min": Key("natural", _EVERYWHERE, "token_warmup_min"),
    "validation_split": Key("share", _EVERYWHERE, "validation_split", 0.0),
    "validation_seed": Key("int", _OF_DATASET, "validation_seed"),
}

#: keys that have a second published name
OTHER_NAMES = {"interpolation_type": "resize_interpolation"}

#: keys that change an image at each use, so latents cannot be encoded once
NOT_WITH_CACHED_LATENTS = ("random_crop", "face_crop_aug_range", "color_aug")
#: keys that change captions at each use, so several variants must be encoded
NEEDS_CAPTION_VARIANTS = ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate")
#: keys without a meaning for the images of a metadata file
NOT_WITH_METADATA = ("caption_extension", "class_tokens", "is_reg", "cache_info")

#: names that belong on the command line only
OPTIONS_ONLY = (
    *("debug_dataset", "max_token_length", "on_bad_image", "prior_loss_weight"),
    *("validate_every_n_epochs", "validate_every_n_steps", "max_validation_steps"),
)

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def parse_size(value: Any) -> tuple[int, int] | None:
    """Return (W, H) of a number, a list, or the command line's "n" or "w,h"; ``None`` for anything else."""
    if isinstance(value, str):
        parts = value.replace(" ", "").split(",")
        if not all(part.isdecimal() for part in parts):
            return None
        value = [int(part) for part in parts]
    if _is_int(value):
        value = [value]
    if not value or len(value) > 2 or min(value) < 1:
        return None
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def number_range(value: Any) -> tuple[float, float] | None:
    """Return (low, high) of a list, or of the command line's "low,high"; ``None`` for anything else."""
    if isinstance(value, str):
        try:
            value = [float(part) for part in value.split(",")]
        except ValueError:
            return None
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_number(n) for n in value):
        return None
    low, high = float(value[0]), float(value[1])
    return (low, high) if 0 < low <= high < math.inf else None


#: kind -> (test, what to write)
CHECKS = {
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "int": (_is_int, "a whole number"),
    "natural": (lambda v: _is_int(v) and v >= 0, "a whole number, 0 or more"),
    "positive": (lambda v: _is_int(v) and v >= 1, "a whole number, 1 or more"),
    "number": (_is_number, "a number"),
    "amount": (lambda v: _is_number(v) and v >= 0, "a number, 0 or more"),
    "share": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "str": (lambda v: isinstance(v, str), "text in quotes"),
    "text": (lambda v: isinstance(v, str) and v != "", "text in quotes, not empty"),
    "table": (lambda v: isinstance(v, Mapping), "a table"),
    "range": (
        lambda v: v == [] or (isinstance(v, list) and number_range(v) is not None),
        "two numbers, the lower first and above 0, such as [2.0, 4.0]",
    ),
    "interpolation": (lambda v: v in INTERPOLATIONS, "one of " + ", ".join(INTERPOLATIONS)),
    "size": (
        lambda v: (
            (_is_int(v) and v > 0)
            or (isinstance(v, list) and len(v) in (1, 2) and all(_is_int(n) and n > 0 for n in v))
        ),
        "a number of pixels, or [width, height]",
    ),
}

#: kinds that the command line writes in another form than the file -> reader, which returns ``None`` on failure
FROM_COMMAND_LINE = {"size": parse_size, "range": number_range}
