"""Every published key of a dataset file, at every level that is published for it, from there and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.config.arguments import DatasetOptions
from library.data.dataset_config import load_dataset_config
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.errors import UserError

#: key -> levels from the outermost, and options that stand in for it
PUBLISHED: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "data" / "dataset_config.json").read_text()
)
LEVELS = ["[general]", "[[datasets]]", "[[datasets.subsets]]"]

Get = Callable[[DatasetSpec, SubsetSpec], Any]

#: key -> two values and where the checked file has the one that counts
VALUES: dict[str, tuple[Any, Any, Get]] = {
    "resolution": ([512, 256], [256, 768], lambda d, s: list(d.buckets.resolution)),
    "batch_size": (2, 3, lambda d, s: d.batch_size),
    "enable_bucket": (True, False, lambda d, s: d.buckets.enabled),
    "min_bucket_reso": (64, 128, lambda d, s: d.buckets.min_side),
    "max_bucket_reso": (512, 640, lambda d, s: d.buckets.max_side),
    "bucket_reso_steps": (32, 16, lambda d, s: d.buckets.step),
    "bucket_no_upscale": (True, False, lambda d, s: d.buckets.no_upscale),
    "network_multiplier": (0.5, 2.0, lambda d, s: d.network_multiplier),
    "resize_interpolation": ("area", "nearest", lambda d, s: s.resize_interpolation),
    "cache_info": (True, False, lambda d, s: s.cache_info),
    "num_repeats": (2, 3, lambda d, s: s.num_repeats),
    "flip_aug": (True, False, lambda d, s: s.flip_aug),
    "random_crop": (True, False, lambda d, s: s.random_crop),
    "color_aug": (True, False, lambda d, s: s.color_aug),
    "face_crop_aug_range": ([2.0, 4.0], [1.5, 2.5], lambda d, s: list(s.face_crop_range or ())),
    "shuffle_caption": (True, False, lambda d, s: s.captions.shuffle),
    "keep_tokens": (1, 2, lambda d, s: s.captions.keep_tokens),
    "keep_tokens_separator": ("|||", "###", lambda d, s: s.captions.keep_tokens_separator),
    "secondary_separator": (";;;", "+++", lambda d, s: s.captions.secondary_separator),
    "caption_separator": (";", "|", lambda d, s: s.captions.separator),
    "caption_extension": (".tag", ".cap", lambda d, s: s.caption_extension),
    "caption_prefix": ("one", "two", lambda d, s: s.captions.prefix),
    "caption_suffix": ("one", "two", lambda d, s: s.captions.suffix),
    "enable_wildcard": (True, False, lambda d, s: s.captions.wildcards),
    "caption_dropout_rate": (0.25, 1, lambda d, s: s.captions.dropout_rate),
    "caption_dropout_every_n_epochs": (2, 3, lambda d, s: s.captions.dropout_every_n_epochs),
    "caption_tag_dropout_rate": (0.25, 1, lambda d, s: s.captions.tag_dropout_rate),
    "custom_attributes": ({"a": 1}, {"b": "c"}, lambda d, s: s.custom_attributes),
    "class_tokens": ("sks cat", "cat", lambda d, s: s.class_tokens),
    "token_warmup_min": (2, 3, lambda d, s: s.captions.warmup_min),
    "token_warmup_step": (100, 0.5, lambda d, s: s.captions.warmup_step),
    "validation_split": (0.25, 0.5, lambda d, s: s.validation_split),
    "validation_seed": (4, 5, lambda d, s: d.validation_seed),
}

#: of one level only; each has tests of its own
OF_SUBSETS = {"image_dir", "metadata_file", "is_reg", "alpha_mask", "conditioning_data_dir"}
OF_THE_COMMAND_LINE = {"debug_dataset", "max_token_length", "prior_loss_weight"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    return folder


def load(tmp_path: Path, images: Path, given: dict[str, dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """A dataset file with these lines at these levels."""
    subset = {"image_dir": str(images), **given.get(LEVELS[2], {})}
    content = {
        "general": {"resolution": 256, "enable_bucket": True, **given.get(LEVELS[0], {})},
        "datasets": [{**given.get(LEVELS[1], {}), "subsets": [subset]}],
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    dataset = load_dataset_config(path, DatasetOptions(**options)).datasets[0]
    return dataset, dataset.subsets[0]


def test_all_published_keys_are_here() -> None:
    assert set(VALUES) | OF_SUBSETS | OF_THE_COMMAND_LINE == set(PUBLISHED)
    assert {key for key, of in PUBLISHED.items() if of["levels"] == LEVELS[2:]} == OF_SUBSETS
    assert {key for key, of in PUBLISHED.items() if not of["levels"]} == OF_THE_COMMAND_LINE


@pytest.mark.parametrize("key", VALUES)
def test_the_nearest_level_counts(tmp_path: Path, images: Path, key: str) -> None:
    far, near, get = VALUES[key]
    levels = [level for level in LEVELS if level in PUBLISHED[key]["levels"]]
    for index, level in enumerate(levels):
        assert get(*load(tmp_path, images, {level: {key: far}})) == far
        outer = {other: {key: far} for other in levels[:index]}
        assert get(*load(tmp_path, images, {**outer, level: {key: near}})) == near


def test_the_command_line_stands_in_for_what_the_file_does_not_say(tmp_path: Path, images: Path) -> None:
    checked = 0
    for key, (far, near, get) in VALUES.items():
        for flag in PUBLISHED[key]["flags"]:
            if not hasattr(DatasetOptions(), flag):
                continue  # validation has options of its own
            value = ",".join(map(str, far)) if isinstance(far, list) else far
            if key not in ("resolution", "enable_bucket"):  # which every file here gives
                assert get(*load(tmp_path, images, {}, **{flag: value})) == far
            level = PUBLISHED[key]["levels"][0]
            assert get(*load(tmp_path, images, {level: {key: near}}, **{flag: value})) == near
            checked += 1
    assert checked > 25


@pytest.mark.parametrize("key", sorted(OF_THE_COMMAND_LINE))
def test_keys_of_the_command_line_are_refused(tmp_path: Path, images: Path, key: str) -> None:
    for level in LEVELS:
        with pytest.raises(UserError, match=f"{key}: belongs on the command line: --{key}"):
            load(tmp_path, images, {level: {key: 1}})


@pytest.mark.parametrize(
    "key",
    # a validation split may stand in subsets too here
    [key for key, of in PUBLISHED.items() if 0 < len(of["levels"]) < 3 and key != "validation_split"],
)
def test_keys_at_other_levels_are_refused(tmp_path: Path, images: Path, key: str) -> None:
    value = VALUES[key][0] if key in VALUES else "x" if key.endswith(("dir", "file")) else True
    for level in set(LEVELS) - set(PUBLISHED[key]["levels"]):
        with pytest.raises(UserError, match=rf"{key}: belongs into "):
            load(tmp_path, images, {level: {key: value}})
