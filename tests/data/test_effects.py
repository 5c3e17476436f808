"""Settings that can have no effect are named where they stand; settings that serve any subset are not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.config.arguments import DatasetOptions
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from tests.data.samples import SD, draw

BUCKETS = "enable_bucket = true"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", {"a.png": (64, 64), "b.png": (64, 64)})


def warnings(
    caplog: pytest.LogCaptureFixture,
    folder: Path,
    *,
    general: str = "",
    dataset: str = "",
    subset: str = "",
    more: str = "",
    images: bool = False,
    **options: object,
) -> list[str]:
    """Return the warnings on reading the file and, with ``images``, on finding them."""
    path = folder.parent / "data.toml"
    path.write_text(
        f"[general]\ncaption_extension = '.txt'\n{general}\n[[datasets]]\nresolution = 512\n{dataset}\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\n{subset}\n{more}\n",
        encoding="utf-8",
    )
    with caplog.at_level(logging.WARNING):
        config = load_dataset_config(path, DatasetOptions(**options))
        if images:
            TrainingData(config, seed=1, latent=SD)
    return [record.getMessage().replace(f"{folder.parent}/", "") for record in caplog.records]


SUBSET = "data.toml: [[datasets]] 1 > [[datasets.subsets]] 1: "

#: where it stands -> the one line that names it
BY_SETTINGS = [
    ({"subset": "keep_tokens = 1"}, f"{SUBSET}keep_tokens has no effect without shuffle_caption"),
    ({"dataset": "keep_tokens = 1"}, "data.toml: [[datasets]] 1: keep_tokens has no effect without"),
    ({"general": "keep_tokens = 1"}, "data.toml: [general]: keep_tokens has no effect without"),
    (
        {"dataset": "min_bucket_reso = 256\nmax_bucket_reso = 768\nbucket_no_upscale = true"},
        "data.toml: [[datasets]] 1: min_bucket_reso, max_bucket_reso, bucket_no_upscale have no effect without "
        "enable_bucket",
    ),
    ({"general": "bucket_reso_steps = 32"}, "bucket_reso_steps has no effect without enable_bucket"),
    (
        {"dataset": f"{BUCKETS}\nbucket_no_upscale = true\nmax_bucket_reso = 768"},
        "max_bucket_reso has no effect with bucket_no_upscale",
    ),
    ({"subset": "caption_separator = ';'"}, "caption_separator has no effect where tags are"),
    ({"subset": "token_warmup_min = 3"}, f"{SUBSET}token_warmup_min has no effect without token_warmup_step"),
    ({"dataset": "validation_seed = 3"}, "data.toml: [[datasets]] 1: validation_seed has no effect without"),
    (
        {"subset": "caption_dropout_rate = 1\nshuffle_caption = true\ncaption_prefix = 'p'"},
        f"{SUBSET}shuffle_caption, caption_prefix have no effect with caption_dropout_rate 1",
    ),
]

#: looks like one of the above, and has an effect or asks for nothing
FINE = [
    {"subset": "keep_tokens = 1\nshuffle_caption = true"},
    {"general": "keep_tokens = 1", "subset": "caption_tag_dropout_rate = 0.1"},
    {
        "subset": "keep_tokens = 0\ntoken_warmup_min = 1\ncaption_separator = ','",
        "dataset": "bucket_no_upscale = false",
    },
    {"dataset": f"{BUCKETS}\nmin_bucket_reso = 256\nmax_bucket_reso = 768"},
    {"general": "bucket_reso_steps = 32", "enable_bucket": True},
    {"subset": "caption_separator = ';'\nsecondary_separator = '|'"},
    {"token_warmup_min": 3, "subset": "token_warmup_step = 10"},
    {"token_warmup_step": 10, "subset": "token_warmup_min = 3"},
    {"dataset": "enable_bucket = false\nmax_bucket_reso = 768"},  # turned off for a while, as it seems
    {"min_bucket_reso": 256, "bucket_reso_steps": 64},  # the defaults
    {"subset": "caption_dropout_rate = 0.5\nshuffle_caption = true\ncaption_prefix = 'p'"},
]


@pytest.mark.parametrize(("given", "words"), BY_SETTINGS, ids=lambda v: v[:60] if isinstance(v, str) else "")
def test_by_other_settings(
    caplog: pytest.LogCaptureFixture, folder: Path, given: dict[str, object], words: str
) -> None:
    (line,) = warnings(caplog, folder, **given)
    assert words in line


@pytest.mark.parametrize("given", FINE, ids=lambda given: "-".join(given))
def test_with_an_effect(caplog: pytest.LogCaptureFixture, folder: Path, given: dict[str, object]) -> None:
    assert warnings(caplog, folder, **given) == []


def test_what_serves_one_subset_is_not_named(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    other = draw(folder.parent / "other", {"c.png": (64, 64)})
    more = f"[[datasets.subsets]]\nimage_dir = '{other}'\nshuffle_caption = true"
    assert warnings(caplog, folder, general="keep_tokens = 1", more=more) == []
    assert len(warnings(caplog, folder, subset="keep_tokens = 1", more=more)) == 1


#: the images' captions are "cat, dog, a" and "cat, dog, b"
BY_IMAGES = [
    ("alpha_mask = true", "alpha_mask has no effect: none of the images has an alpha channel"),
    ("shuffle_caption = true\nkeep_tokens = 2", "no caption has two tags after the 2 that keep_tokens keeps"),
    ("shuffle_caption = true\ncaption_separator = '/'", 'no caption has two tags (split at "/")'),
    ("caption_tag_dropout_rate = 0.5\nkeep_tokens = 3", "caption_tag_dropout_rate has no effect: no caption has a tag"),
    (
        "token_warmup_step = 10\ntoken_warmup_min = 3",
        "token_warmup_step has no effect: no caption has more than 3 tags",
    ),
    ("enable_wildcard = true", "enable_wildcard has no effect: no caption has a choice"),
    ("keep_tokens_separator = '|||'", 'keep_tokens_separator has no effect: no caption has "|||"'),
    ("secondary_separator = ';;;'", 'secondary_separator has no effect: no caption has ";;;"'),
]


@pytest.mark.parametrize(("subset", "words"), BY_IMAGES, ids=lambda v: v.split(" ")[0])
def test_by_the_images(caplog: pytest.LogCaptureFixture, folder: Path, subset: str, words: str) -> None:
    (line,) = warnings(caplog, folder, subset=subset, images=True)
    assert line.startswith(SUBSET) and words in line


@pytest.mark.parametrize(
    ("subset", "caption"),
    [
        ("shuffle_caption = true\nkeep_tokens = 1", "cat, dog, tree"),
        ("caption_tag_dropout_rate = 0.5\nkeep_tokens = 1", "cat, dog"),
        ("enable_wildcard = true", "a {cat|dog}"),
        ("enable_wildcard = true", "one\ntwo"),
        ("enable_wildcard = true\ncaption_prefix = '{a|b}'", "cat"),
        ("keep_tokens_separator = '|||'", "cat ||| dog"),
        ("secondary_separator = ';;;'\nshuffle_caption = true", "cat;;;dog, tree"),
    ],
)
def test_one_image_is_enough(caplog: pytest.LogCaptureFixture, folder: Path, subset: str, caption: str) -> None:
    (folder / "a.txt").write_text("cat", encoding="utf-8")
    (folder / "b.txt").write_text(caption, encoding="utf-8")
    assert warnings(caplog, folder, subset=subset, images=True) == []


def test_one_image_with_alpha_is_enough(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 4), np.uint8)).save(folder / "b.png")
    assert warnings(caplog, folder, subset="alpha_mask = true", images=True) == []
