"""The dataset file: where a value comes from, and every mistake named at once."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from library.config.arguments import DatasetOptions
from library.data.dataset_config import load_dataset_config
from library.errors import UserError
from tests.data.samples import draw


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", {"a.png": (8, 8)})


def load(tmp_path: Path, text: str, name: str = "data.toml", **options: object):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(path, DatasetOptions(**options))


def problems(tmp_path: Path, text: str, name: str = "data.toml", **options: object) -> list[str]:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, name, **options)
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def minimal(images: Path, *, general: str = "", dataset: str = "", subset: str = "") -> str:
    return (
        f"[general]\n{general}\n[[datasets]]\nresolution = 512\n{dataset}\n[[datasets.subsets]]\n"
        f"image_dir = '{images}'\n{subset}\n"
    )


@pytest.mark.parametrize(
    ("general", "dataset", "subset", "flag", "expected"),
    [
        ("", "", "", None, 1),
        ("", "", "", 2, 2),
        ("num_repeats = 3", "", "", 2, 3),
        ("num_repeats = 3", "num_repeats = 4", "", 2, 4),
        ("num_repeats = 3", "num_repeats = 4", "num_repeats = 5", 2, 5),
    ],
)
def test_the_nearest_value_wins(
    tmp_path: Path, images: Path, general: str, dataset: str, subset: str, flag: int | None, expected: int
) -> None:
    options = {} if flag is None else {"dataset_repeats": flag}
    config = load(tmp_path, minimal(images, general=general, dataset=dataset, subset=subset), **options)
    assert config.datasets[0].subsets[0].num_repeats == expected


def test_false_and_zero_and_empty_stop_the_search(tmp_path: Path, images: Path) -> None:
    general, own = "flip_aug = true\nkeep_tokens = 2", "flip_aug = false\nkeep_tokens = 0\ncaption_prefix = ''"
    text = minimal(images, general=general, subset=own)
    subset = load(tmp_path, text, caption_prefix="p", shuffle_caption=True).datasets[0].subsets[0]
    assert (subset.flip_aug, subset.captions.keep_tokens, subset.captions.prefix) == (False, 0, "")
    assert subset.captions.shuffle  # a flag holds where the file is silent


def test_values_take_their_form(tmp_path: Path, images: Path) -> None:
    text = minimal(
        images,
        dataset="network_multiplier = 1\nbatch_size = 3",
        subset="caption_extension = 'txt'\ncaption_dropout_rate = 1\ncustom_attributes = {a = 1}",
    )
    dataset = load(tmp_path, text).datasets[0]
    assert dataset.buckets.resolution == (512, 512)
    assert dataset.network_multiplier == 1.0
    assert dataset.batch_size == 3
    assert dataset.subsets[0].caption_extension == ".txt"
    assert dataset.subsets[0].captions.dropout_rate == 1
    assert dataset.subsets[0].custom_attributes == {"a": 1}


@pytest.mark.parametrize(
    ("written", "expected"), [("512", (512, 512)), ("512,768", (512, 768)), ("512, 768", (512, 768))]
)
def test_resolution_of_the_command_line(tmp_path: Path, images: Path, written: str, expected: tuple[int, int]) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
    assert load(tmp_path, text, resolution=written).datasets[0].buckets.resolution == expected


def test_interpolation_has_two_names(tmp_path: Path, images: Path) -> None:
    """``interpolation_type`` of a dataset or ``[general]`` is as near as ``resize_interpolation`` there."""
    own = minimal(images, dataset="interpolation_type = 'nearest'", general="resize_interpolation = 'area'")
    dataset = load(tmp_path, own, resize_interpolation="bicubic").datasets[0]
    assert (dataset.resize_interpolation, dataset.subsets[0].resize_interpolation) == ("nearest", "nearest")
    general = minimal(images, general="interpolation_type = 'lanczos'", subset="resize_interpolation = 'box'")
    dataset = load(tmp_path, general).datasets[0]
    assert (dataset.resize_interpolation, dataset.subsets[0].resize_interpolation) == ("lanczos", "box")
    both = minimal(images, dataset="interpolation_type = 'area'\nresize_interpolation = 'area'")
    (line,) = problems(tmp_path, both)
    assert line.endswith("interpolation_type: means the same as resize_interpolation; write one of them")
    (line,) = problems(tmp_path, minimal(images, dataset="interpolation_type = 'lanczos4'"))
    assert "[[datasets]] 1: interpolation_type: 'lanczos4': write one of lanczos, " in line


def test_old_spelling_of_caption_extension_wins(tmp_path: Path, images: Path) -> None:
    config = load(tmp_path, minimal(images), caption_extension=".a", caption_extention=".b")
    assert config.datasets[0].subsets[0].caption_extension == ".b"


def test_json(tmp_path: Path, images: Path) -> None:
    content = {"general": {"resolution": [64, 32]}, "datasets": [{"subsets": [{"image_dir": str(images)}]}]}
    config = load(tmp_path, json.dumps(content), "data.json")
    assert config.datasets[0].buckets.resolution == (64, 32)


def test_all_mistakes_at_once(tmp_path: Path, images: Path) -> None:
    text = f"""
batch_size = 2
[general]
flip_aug = 1
image_dir = 'x'
[[datasets]]
batch_size = true
resolutoin = 512
max_token_length = 225
[[datasets.subsets]]
image_dir = '{images}'
num_repeats = 2.0
caption_dropout_rate = 1.5
[[datasets.subsets]]
image_dir = 'nowhere'
keep_tokens = -1
resize_interpolation = 'lanczos4'
"""
    second = "data.toml: [[datasets]] 1 > [[datasets.subsets]] 2"
    assert problems(tmp_path, text) == [
        "data.toml: top level: batch_size: unknown key; put it into [general]",
        "data.toml: [general]: flip_aug: 1: write true or false",
        "data.toml: [general]: image_dir: belongs into [[datasets.subsets]]",
        "data.toml: [[datasets]] 1: batch_size: true: write a whole number, 1 or more",
        'data.toml: [[datasets]] 1: resolutoin: unknown key (did you mean "resolution"?)',
        "data.toml: [[datasets]] 1: max_token_length: belongs on the command line: --max_token_length",
        "data.toml: [[datasets]] 1: resolution: is missing: give it here or as --resolution, such as 512",
        "data.toml: [[datasets]] 1 > [[datasets.subsets]] 1: num_repeats: 2.0: write a whole number",
        "data.toml: [[datasets]] 1 > [[datasets.subsets]] 1: caption_dropout_rate: 1.5: write a number from 0 to 1",
        f"{second}: keep_tokens: -1: write a whole number, 0 or more",
        f"{second}: resize_interpolation: 'lanczos4': write one of lanczos, nearest, bilinear, linear, bicubic, cubic, "
        "area, box",
        f"{second}: image_dir: nowhere: no such folder",
    ]


@pytest.mark.parametrize("key", ["flip_aug", "enable_bucket"])
def test_an_integer_is_no_boolean(tmp_path: Path, images: Path, key: str) -> None:
    assert problems(tmp_path, minimal(images, general=f"{key} = 0")) == [
        f"data.toml: [general]: {key}: 0: write true or false"
    ]


@pytest.mark.parametrize(
    "key", ["batch_size", "keep_tokens", "network_multiplier", "caption_dropout_rate", "resolution"]
)
def test_a_boolean_is_no_number(tmp_path: Path, images: Path, key: str) -> None:
    (line,) = problems(tmp_path, minimal(images, general=f"{key} = true"))
    assert line.startswith(f"data.toml: [general]: {key}: true: write a")


def test_a_date_is_shown_as_it_is_written(tmp_path: Path, images: Path) -> None:
    (line,) = problems(tmp_path, minimal(images, general="keep_tokens = 1979-05-27"))
    assert line == "data.toml: [general]: keep_tokens: 1979-05-27: write a whole number, 0 or more"


@pytest.mark.parametrize("key", ["network_multiplier", "token_warmup_step", "caption_dropout_rate"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_is_finite(tmp_path: Path, images: Path, key: str, value: str) -> None:
    (line,) = problems(tmp_path, minimal(images, dataset=f"{key} = {value}"))
    assert line.startswith(f"data.toml: [[datasets]] 1: {key}: {value}: write a number")


def test_the_tag_warm_up_comes_from_anywhere(tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warm_up(text: str, **options: object) -> tuple[float, int]:
        captions = load(tmp_path, text, **options).datasets[0].subsets[0].captions
        return captions.warmup_step, captions.warmup_min

    assert warm_up(minimal(images)) == (0, 1)
    assert warm_up(minimal(images), token_warmup_step=0.25, token_warmup_min=3) == (0.25, 3)
    assert warm_up(minimal(images, general="token_warmup_step = 100"), token_warmup_min=3) == (100, 3)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        warm_up(minimal(images, subset="token_warmup_min = 3"))
    assert "token_warmup_min has no effect without token_warmup_step" in caplog.text
    (line,) = problems(tmp_path, minimal(images, dataset="token_warmup_step = -1"))
    assert line == "data.toml: [[datasets]] 1: token_warmup_step: -1: write a number, 0 or more"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"caption_dropout_rate": 2.0}, "--caption_dropout_rate 2.0: write a number from 0 to 1"),
        ({"train_batch_size": 0}, "--train_batch_size 0: write a whole number, 1 or more"),
        ({"resolution": "big"}, "--resolution big: write a number of pixels, or width,height"),
        ({"resolution": "51²"}, "--resolution 51²: write a number of pixels, or width,height"),
    ],
)
def test_values_of_the_command_line_are_checked_too(
    tmp_path: Path, images: Path, options: dict[str, object], expected: str
) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
    assert problems(tmp_path, text, **{"resolution": "64", **options}) == [expected]


@pytest.mark.parametrize("flag", ["cache_latents", "cache_latents_to_disk"])
@pytest.mark.parametrize("line", ["random_crop = true", "color_aug = true", "face_crop_aug_range = [2, 4]"])
def test_what_varies_is_refused_with_cached_latents(tmp_path: Path, images: Path, flag: str, line: str) -> None:
    (found,) = problems(tmp_path, minimal(images, subset=line), **{flag: True})
    assert f"{line.split()[0]}: not with cached latents" in found


def test_augmentations_and_masks(tmp_path: Path, images: Path) -> None:
    masks = draw(tmp_path / "masks", {"a.png": (8, 8)}, captions=False)
    own = f"color_aug = true\nalpha_mask = true\nface_crop_aug_range = [2, 4.5]\nconditioning_data_dir = '{masks}'"
    subset = load(tmp_path, minimal(images, subset=own)).datasets[0].subsets[0]
    assert (subset.color_aug, subset.alpha_mask, subset.face_crop_range) == (True, True, (2.0, 4.5))
    assert subset.conditioning_dir == masks
    flags = {"alpha_mask": True, "face_crop_aug_range": "1.5,2", "conditioning_data_dir": str(masks)}
    subset = load(tmp_path, minimal(images), **flags).datasets[0].subsets[0]
    assert (subset.color_aug, subset.alpha_mask, subset.face_crop_range) == (False, True, (1.5, 2.0))
    assert subset.conditioning_dir == masks
    off = "alpha_mask = false\nface_crop_aug_range = []\nconditioning_data_dir = ''"
    subset = load(tmp_path, minimal(images, subset=off), **flags).datasets[0].subsets[0]
    assert (subset.alpha_mask, subset.face_crop_range, subset.conditioning_dir) == (False, None, None)


@pytest.mark.parametrize("value", ["[4.0, 2.0]", "[0, 2]", "[2.0]", "[1, true]", "'2.0,4.0'", "3", "[1, inf]"])
def test_a_range_is_two_numbers(tmp_path: Path, images: Path, value: str) -> None:
    (line,) = problems(tmp_path, minimal(images, general=f"face_crop_aug_range = {value}"))
    assert line.startswith("data.toml: [general]: face_crop_aug_range: ")
    assert line.endswith("write two numbers, the lower first and above 0, such as [2.0, 4.0]")


@pytest.mark.parametrize("value", ["4,2", "2", "a,b", "2.0;4.0"])
def test_a_range_on_the_command_line(tmp_path: Path, images: Path, value: str) -> None:
    (line,) = problems(tmp_path, minimal(images), face_crop_aug_range=value)
    assert line.startswith(f"--face_crop_aug_range {value}: write two numbers")


def test_a_folder_of_masks_that_is_not_there(tmp_path: Path, images: Path) -> None:
    (line,) = problems(tmp_path, minimal(images, subset="conditioning_data_dir = 'nowhere'"))
    assert line.endswith("> [[datasets.subsets]] 1: conditioning_data_dir: nowhere: no such folder")


def test_the_command_lines_masks_are_those_of_training_images(tmp_path: Path, images: Path) -> None:
    text = minimal(images) + f"[[datasets.subsets]]\nimage_dir = '{images}'\nis_reg = true\n"
    train, reg = load(tmp_path, text, conditioning_data_dir=str(images)).datasets[0].subsets
    assert (train.conditioning_dir, reg.conditioning_dir) == (images, None)


def test_bucket_bounds(tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = problems(tmp_path, minimal(images, dataset="enable_bucket = true\nmax_bucket_reso = 448"))
    assert line.endswith("256 to 448: must hold the resolution 512x512")
    narrow = "enable_bucket = true\nmin_bucket_reso = 500\nmax_bucket_reso = 520"
    (line,) = problems(tmp_path, minimal(images, dataset=narrow).replace("512", "510"))
    assert "bucket_reso_steps: 64: no multiple from 500 to 520 fits" in line
    load(tmp_path, minimal(images, dataset="max_bucket_reso = 448"))  # without buckets the bound means nothing
    with caplog.at_level(logging.WARNING):
        load(tmp_path, minimal(images, dataset="enable_bucket = true\nmin_bucket_reso = 300\nmax_bucket_reso = 1000"))
    assert "taken as 320 and 960" in caplog.text


def test_subsets_without_repeats_are_left_out(tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = minimal(images) + f"[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeats = 0\n"
    with caplog.at_level(logging.WARNING):
        config = load(tmp_path, text)
    assert len(config.datasets[0].subsets) == 1
    assert "num_repeats is 0" in caplog.text
    assert "nothing is left" in problems(tmp_path, minimal(images, subset="num_repeats = 0"))[0]


def test_missing_and_empty_tables(tmp_path: Path, images: Path) -> None:
    assert problems(tmp_path, "") == ["data.toml: top level: datasets: there must be at least one [[datasets]] table"]
    assert problems(tmp_path, "[[datasets]]\nresolution = 64") == [
        "data.toml: [[datasets]] 1: subsets: there must be at least one [[datasets.subsets]] table"
    ]
    assert "image_dir: is missing" in problems(tmp_path, "[[datasets]]\nresolution=64\n[[datasets.subsets]]\n")[0]
    (tmp_path / "empty" / "folder.png").mkdir(parents=True)
    assert problems(tmp_path, minimal(tmp_path / "empty"))[0].endswith("(.png, .jpg, .jpeg, .webp, .bmp, .avif, .jxl)")
    draw(tmp_path / "empty" / "in ner", {"a.png": (8, 8)})
    assert problems(tmp_path, minimal(tmp_path / "empty"))[0].endswith(
        "name each in a subset of its own, such as in ner"
    )
    assert "image_dir: is missing" in problems(tmp_path, minimal(Path("x")).replace("'x'", "''"))[0]
    (line,) = problems(tmp_path, minimal(images, subset="is_reg = true"))
    assert "nothing to train on" in line


def test_folders_that_may_not_be_read(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the tests may run as root, whom no folder refuses
    monkeypatch.setattr("library.data.dataset_config.os.access", lambda path, mode: False)
    (line,) = problems(tmp_path, minimal(images, subset=f"conditioning_data_dir = '{images}'"))
    assert line.endswith(f"1: image_dir: {images.name}: may not be read (permission denied)")
    with pytest.raises(UserError, match=r"^--train_data_dir .*: may not be read \(permission denied\)$"):
        load_dataset_config(None, DatasetOptions(train_data_dir=str(images), resolution="64"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "must end with .toml or .json" in problems(tmp_path, "", "data.yaml")[0]
    with pytest.raises(UserError, match="x.toml: no such file"):
        load_dataset_config(tmp_path / "x.toml", DatasetOptions())
    assert "not valid JSON" in problems(tmp_path, "{", "data.json")[0]
    (line,) = problems(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\images"\n')
    assert "line 3" in line
    assert "single quotes" in line
    (line,) = problems(tmp_path, '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\new"\n')
    assert r'"C:\new"' in line and "single quotes" in line


def test_places_that_are_nearly_right(tmp_path: Path, images: Path) -> None:
    (line,) = problems(tmp_path, minimal(Path("~/no such images")))
    assert f"only shells replace ~, so write {Path.home() / 'no such images'}" in line
    (line,) = problems(tmp_path, minimal(images.parent))
    assert "holds no images" in line and line.endswith(f"in a subset of its own, such as {images.name}")


# ---- folders instead of a file ----


def test_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path / "train" / "10_sks cat", {"a.png": (8, 8)}, captions=False)
    draw(tmp_path / "train" / "2_sks_dog", {"a.png": (8, 8)}, captions=False)
    draw(tmp_path / "train" / "other", {"a.png": (8, 8)})
    draw(tmp_path / "train" / "0_none", {"a.png": (8, 8)})
    draw(tmp_path / "reg" / "1_cat", {"a.png": (8, 8)}, captions=False)
    train, reg = str(tmp_path / "train"), str(tmp_path / "reg")
    options = DatasetOptions(train_data_dir=train, reg_data_dir=reg, resolution="64")
    with caplog.at_level(logging.WARNING):
        config = load_dataset_config(None, options)
    found = [(s.num_repeats, s.class_tokens, s.is_reg) for s in config.datasets[0].subsets]
    assert found == [(10, "sks cat", False), (2, "sks_dog", False), (1, "cat", True)]
    assert "other: left out" in caplog.text
    assert "0_none: left out" in caplog.text


def test_a_folder_of_images_with_a_folder_of_masks(tmp_path: Path, images: Path) -> None:
    draw(tmp_path / "reg" / "2_cat", {"r.png": (8, 8)}, captions=False)
    options = {"train_data_dir": str(images), "resolution": "64", "reg_data_dir": str(tmp_path / "reg")}
    config = load_dataset_config(None, DatasetOptions(conditioning_data_dir=str(images), **options))
    found = [(s.image_dir, s.num_repeats, s.is_reg, s.conditioning_dir) for s in config.datasets[0].subsets]
    assert found == [(images, 1, False, images), (tmp_path / "reg" / "2_cat", 2, True, None)]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_folders_name_must_be_a_caption(tmp_path: Path) -> None:
    draw(tmp_path / "train" / os.fsdecode(b"3_caf\xe9"), {"a.png": (8, 8)})
    draw(tmp_path / "train" / "2_café {x|y}", {"a.png": (8, 8)})
    with pytest.raises(UserError, match="3_caf.*: the name is a caption, but not in UTF-8; rename the folder"):
        load_dataset_config(None, DatasetOptions(train_data_dir=str(tmp_path / "train"), resolution="64"))


def test_folders_that_are_wrong(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UserError, match="has no folder named <repeats>_<class tokens>"):
        load_dataset_config(None, DatasetOptions(train_data_dir=str(images), resolution="64"))
    with pytest.raises(UserError, match="no such folder"):
        load_dataset_config(None, DatasetOptions(train_data_dir=str(tmp_path / "x"), resolution="64"))


@pytest.mark.parametrize("level", ["general", "dataset", "subset"])
def test_cache_info_may_stand_anywhere(tmp_path: Path, images: Path, level: str) -> None:
    config = load(tmp_path, minimal(images, **{level: "cache_info = true"}))
    assert config.datasets[0].subsets[0].cache_info
    assert not load(tmp_path, minimal(images)).datasets[0].subsets[0].cache_info


def test_on_bad_image_is_an_option_of_the_run(tmp_path: Path, images: Path) -> None:
    assert load(tmp_path, minimal(images)).datasets[0].subsets[0].on_bad_image == "stop"
    (line,) = problems(tmp_path, minimal(images, general="on_bad_image = 'skip'"))
    assert line == "data.toml: [general]: on_bad_image: belongs on the command line: --on_bad_image"
