"""The published metadata keys of a run's data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from library.config.arguments import DatasetOptions
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.describe import metadata, summary_rows
from tests.data.samples import SD, SIZES, draw

Make = Callable[..., TrainingData]

DATASET_KEYS = {
    "is_dreambooth", "batch_size_per_device", "num_train_images", "num_reg_images", "resolution", "enable_bucket",
    "min_bucket_reso", "max_bucket_reso", "tag_frequency", "bucket_info", "resize_interpolation", "subsets",
}  # fmt: skip
SUBSET_KEYS = {
    "img_count", "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens",
    "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix",
    "resize_interpolation", "image_dir", "class_tokens", "is_reg",
}  # fmt: skip


def test_with_a_dataset_file(make_data: Make, folder: Path, tmp_path: Path) -> None:
    reg = draw(tmp_path / "reg", {"r.png": (64, 64), "s.png": (64, 64)}, captions=False)
    same_name = draw(tmp_path / "inner" / "images", {"x.png": (64, 64)})
    more = (
        f"[[datasets.subsets]]\nimage_dir = '{reg}'\nclass_tokens = 'Cat'\nis_reg = true\nnum_repeats = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{same_name}'\n"
        f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    )
    data = make_data(more=more, subset="num_repeats = 2\ncaption_prefix = 'p'\ncolor_aug = true")
    entries = metadata(data, from_file=True, world_size=2)
    json.dumps(entries)
    assert set(entries) == {
        "ss_num_train_images", "ss_num_validation_images", "ss_num_reg_images", "ss_num_batches_per_epoch",
        "ss_dataset_dirs", "ss_tag_frequency", "ss_datasets",
    }  # fmt: skip
    assert entries["ss_num_train_images"] == 2 * 7 + 1 + 7
    assert entries["ss_num_reg_images"] == 4
    assert entries["ss_num_batches_per_epoch"] == data.batches_per_process(2)
    assert entries["ss_dataset_dirs"] == {
        "images": {"n_repeats": 2, "img_count": 7},
        "images (2)": {"n_repeats": 1, "img_count": 1},
        "images (3)": {"n_repeats": 1, "img_count": 7},
    }
    tags = entries["ss_tag_frequency"]
    assert tags["images"] == {"cat": 7, "dog": 7, **{Path(name).stem: 1 for name in SIZES}}
    assert tags["images (2)"] == {"cat": 1, "dog": 1, "x": 1}
    assert tags["reg"] == {"cat": 2}
    assert len(tags) == 3  # the folder of both datasets is counted once
    first = entries["ss_datasets"][0]
    assert set(first) == DATASET_KEYS
    assert all(set(subset) == SUBSET_KEYS for subset in first["subsets"])
    assert first["resolution"] == [64, 64]
    assert first["subsets"][0]["image_dir"] == "images"
    assert first["subsets"][0]["caption_prefix"] == "p"
    assert [subset["color_aug"] for subset in first["subsets"]] == [True, False, False]
    counts = {tuple(b["resolution"]): b["count"] for b in first["bucket_info"]["buckets"].values()}
    # 4 square images twice, the one of the inner folder, and 15 regularization images
    assert counts == {(32, 128): 2, (64, 64): 8 + 1 + 15, (128, 32): 4}
    assert entries["ss_datasets"][1]["bucket_info"] is None


def test_without_a_dataset_file(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "5_sks cat", {"a.png": (64, 64)}, captions=False)
    draw(tmp_path / "reg" / "1_cat", {"a.png": (64, 64)}, captions=False)
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="64", train_batch_size=2
    )
    data = TrainingData(load_dataset_config(None, options), seed=1, latent=SD)
    entries = metadata(data, from_file=False, world_size=3, gradient_accumulation_steps=4)
    assert entries["ss_dataset_dirs"] == {"5_sks cat": {"n_repeats": 5, "img_count": 1}}
    assert entries["ss_reg_dataset_dirs"] == {"1_cat": {"n_repeats": 1, "img_count": 1}}
    assert entries["ss_tag_frequency"] == {"5_sks cat": {"sks cat": 1}, "1_cat": {"cat": 1}}
    assert entries["ss_resolution"] == (64, 64)
    assert entries["ss_bucket_info"] is None
    assert entries["ss_num_reg_images"] == 1
    assert entries["ss_batch_size_per_device"] == 2
    assert entries["ss_total_batch_size"] == 2 * 3 * 4
    assert "ss_datasets" not in entries


def test_tag_frequency_follows_the_rules_of_its_subset(make_data: Make, folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.write_text("Cat;dog ||| bird\nnever used")
    data = make_data(subset="caption_separator = ';'\nkeep_tokens_separator = '|||'\nshuffle_caption = true")
    count = len(list(folder.glob("*.txt")))
    expected = {"cat": count, "dog": count, "bird": count}
    assert metadata(data, from_file=True)["ss_tag_frequency"] == {"images": expected}


def test_rows_for_people(make_data: Make) -> None:
    rows = dict(summary_rows(make_data(subset="num_repeats = 2")))
    assert rows["data"] == "14 images an epoch, batch size 2"
    assert rows["buckets"] == "32x128: 2, 64x64: 8, 128x32: 4"
