"""Metadata files of the fine-tuning method: what their entries become, and every mistake with its place."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from library.config.arguments import DatasetOptions
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.describe import metadata
from library.data.records import ImageRecord
from library.errors import UserError
from tests.data.samples import SD, Encoder, draw, tokenize

IMAGES = {"a.png": (64, 64), "b.jpg": (128, 32), "c.d.webp": (64, 64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", IMAGES, captions=False)


def write(path: Path, content: object) -> Path:
    """JSON; or, of a list, JSON lines."""
    lines = content if isinstance(content, list) else [content]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def load(file: Path, folder: Path | None = None, *, lines: str = "", dataset: str = "") -> TrainingData:
    place = f"image_dir = '{folder}'" if folder else ""
    config = file.with_name("data.toml")
    config.write_text(
        f"[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\nmetadata_file = '{file}'\n{place}\n{lines}\n"
    )
    return TrainingData(load_dataset_config(config, DatasetOptions()), seed=1, latent=SD)


def records(data: TrainingData) -> list[ImageRecord]:
    return data.datasets[0].records


def captions(data: TrainingData) -> dict[str, str]:
    return {record.path.name: record.caption for record in records(data)}


def problems(file: Path, folder: Path | None = None, **settings: object) -> list[str]:
    with pytest.raises(UserError) as error:
        load(file, folder, **settings)
    return str(error.value).replace(f"{file.parent}{os.sep}", "").splitlines()


# ---- images ----


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_full_paths_need_no_folder(tmp_path: Path, folder: Path, ending: str) -> None:
    entries = {str(folder / name): {"caption": f"of {name}", "image_size": [1, 1]} for name in IMAGES}
    lines = [{"image_path": name, **fields} for name, fields in entries.items()]
    data = load(write(tmp_path / f"meta{ending}", lines if ending == ".jsonl" else entries))
    assert [(r.path, r.size, r.caption) for r in records(data)] == [
        (folder / name, size, f"of {name}") for name, size in IMAGES.items()
    ]


@pytest.mark.parametrize("written", ["images/a.png", "a.png", "a", "./a.png", "../images/a"])
def test_relative_paths(tmp_path: Path, folder: Path, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to image_dir, or to where the script runs, as the scripts that make metadata write them."""
    monkeypatch.chdir(tmp_path)
    data = load(write(tmp_path / "meta.json", {written: {"tags": "x"}}), folder)
    assert records(data)[0].path.samefile(folder / "a.png")


def test_the_folder_goes_before_the_working_folder(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "elsewhere", {"a.png": (32, 32)}, captions=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = write(tmp_path / "meta.json", {"a.png": {"tags": "x"}})
    assert records(load(file, folder))[0].size == (64, 64)
    assert records(load(file))[0].size == (32, 32)


def test_names_without_ending_may_have_dots_and_folders(tmp_path: Path, folder: Path) -> None:
    draw(folder / "in ner", {"x.PNG": (64, 64)}, captions=False)
    entries = {"c.d": {"tags": "x"}, "in ner/x": {"tags": "y"}, "in ner\\x.PNG": {"tags": "z"}}
    assert captions(load(write(tmp_path / "meta.json", entries), folder)) == {"c.d.webp": "x", "x.PNG": "z"}


def test_a_name_of_two_images_is_refused(tmp_path: Path, folder: Path) -> None:
    draw(folder, {"a.webp": (64, 64)}, captions=False)
    (line,) = problems(write(tmp_path / "meta.json", {"a": {"tags": "x"}}), folder)
    assert line == 'meta.json: "a": may be a.png or a.webp in images; write the ending'
    assert captions(load(write(tmp_path / "meta.json", {"a.png": {"tags": "x"}}), folder)) == {"a.png": "x"}


def test_the_later_entry_of_a_image_counts(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"image_path": name, "caption": name} for name in ("a.png", "b", "a", str(folder / "a.png"))]
    with caplog.at_level(logging.WARNING):
        data = load(write(tmp_path / "meta.jsonl", lines), folder)
    assert captions(data) == {"a.png": str(folder / "a.png"), "b.jpg": "b"}
    assert "meta.jsonl: line 3 and 1 more" in caplog.text


# ---- captions ----


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"caption": "a cat"}, "a cat"),
        ({"tags": "cat, dog"}, "cat, dog"),
        ({"caption": "a cat", "tags": "cat, dog"}, "a cat, cat, dog"),
        ({"caption": None, "tags": " cat "}, "cat"),
        ({"caption": "", "tags": "cat"}, "cat"),
        ({"caption": "a cat, ", "tags": "x, y,"}, "a cat, x, y"),
        ({"caption": ""}, ""),  # an empty caption is one
        ({"caption": "one\n\ntwo", "tags": "x,\ny"}, "one, x, y\ntwo, x, y"),  # each line is a caption of its own
        ({"tags": "one\ntwo"}, "one\ntwo"),
        ({"caption": "ネコ", "train_resolution": [64, 64]}, "ネコ"),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_caption_and_tags(
    tmp_path: Path, folder: Path, ending: str, fields: Mapping[str, object], expected: str
) -> None:
    content: object = [{"image_path": "a.png", **fields}] if ending == ".jsonl" else {"a.png": fields}
    assert captions(load(write(tmp_path / f"m{ending}", content), folder)) == {"a.png": expected}


def test_tags_are_joined_by_the_separator(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {"caption": "a cat", "tags": "x; y"}})
    data = load(file, folder, lines="caption_separator = ';'\nshuffle_caption = true\nkeep_tokens = 1")
    (batch,) = data.dataloader(epoch=0, start_batch=0, tokenize=tokenize, num_workers=0)
    assert batch.captions[0] in ("a cat; x; y", "a cat; y; x")


# ---- mistakes ----


def test_mistakes_of_entries(tmp_path: Path, folder: Path) -> None:
    entries = {"a.png": {"captoin": "x"}, "b.jpg": {"caption": 1}, "gone.png": {"tags": "x"}}
    assert problems(write(tmp_path / "meta.json", entries), folder) == [
        'meta.json: "a.png": has neither caption nor tags (did you mean "caption"?)',
        'meta.json: "b.jpg": caption: 1: write text in quotes',
        'meta.json: "gone.png": no image gone.png in images',
    ]


def test_mistakes_of_lines(tmp_path: Path, folder: Path) -> None:
    lines: list[object] = [
        {"image_path": "a.png", "caption": "x\u2028y"},  # no end of a line in JSON
        "{'image_path'",
        "",
        {"image_pth": "a.png", "caption": "x"},
        {"image_path": "b.jpg", "tags": ["x"]},
    ]
    first, *others = problems(write(tmp_path / "meta.jsonl", lines), folder)
    assert first.startswith("meta.jsonl: line 2: not valid JSON")
    assert others == [
        'meta.jsonl: line 4: must be {"image_path": "...", "caption": "..."} (did you mean "image_path"?)',
        "meta.jsonl: line 5: tags: ['x']: write text in quotes",
    ]


def test_many_mistakes_are_counted(tmp_path: Path, folder: Path) -> None:
    found = problems(write(tmp_path / "meta.json", {f"{n}.png": {"tags": "x"} for n in range(10)}), folder)
    assert len(found) == 4
    assert found[3] == "meta.json: and 7 more entries like these"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("meta.json", "{", "not valid JSON"),
        ("meta.json", "[]", "name a file with one entry a line .jsonl"),
        ("meta.json", '{"image_path": "a.png"}\n{"image_path": "b"}', "name a file with one entry a line .jsonl"),
        (
            "meta.json",
            '{"a.png": {"caption": "half \\ud83d"}}',
            "caption: holds half a character, 'half \\ud83d'; write",
        ),
        pytest.param("meta.json", "[" * 100_000, "not valid JSON", id="deep"),
        ("meta.json", "{}", "has no entries"),
        ("meta.json", '{"a.png": "a cat"}', '"a.png": must be {"caption": "...", "tags": "..."}'),
        ("meta.json", '{"a\\u0000/b": {"tags": "x"}}', "no image"),
        ("meta.json", '{"": {"tags": "x"}}', '"": no image'),
        ("meta.jsonl", "\n\n", "has no entries"),
        ("meta.jsonl", '"a.png"', "line 1: must be"),
        ("meta.txt", "{}", "metadata_file: meta.txt: must end with .json or .jsonl"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, folder: Path, name: str, text: str, expected: str) -> None:
    (line,) = problems(write(tmp_path / name, [text]), folder)
    assert expected in line and name in line


@pytest.mark.parametrize("old", ["C:\\data\\images\\a.png", "D:/a.png", "/home/me/a.png", "other/a.png"])
def test_images_that_were_moved(tmp_path: Path, folder: Path, old: str) -> None:
    file = write(tmp_path / "meta.json", {old: {"tags": "x"}})
    (line,) = problems(file, folder)
    assert line.endswith(f"no image {old} in images; there is a.png: write the name without its old folder")
    (line,) = problems(file)
    assert f"no such image: {old}" in line or f"no image {old} in the working folder" in line


def test_places_that_are_wrong(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {"tags": "x"}, "/no/b.png": {"tags": "x"}})
    assert problems(file) == [
        'meta.json: "a.png": no image a.png in the working folder; give image_dir, the folder of the images',
        'meta.json: "/no/b.png": no such image: /no/b.png',
    ]
    subset = "data.toml: [[datasets]] 1 > [[datasets.subsets]] 1"
    assert problems(tmp_path / "gone.json", tmp_path / "nowhere") == [
        f"{subset}: metadata_file: gone.json: no such file",
        f"{subset}: image_dir: nowhere: no such folder",
    ]
    (tmp_path / "latin.jsonl").write_bytes(b'{"image_path": "\xe4.png"}')
    assert problems(tmp_path / "latin.jsonl", folder) == ["latin.jsonl: is not UTF-8 text; save it as UTF-8"]


@pytest.mark.parametrize("key", ["caption_extension = '.txt'", "class_tokens = 'cat'", "is_reg = true"])
def test_keys_of_caption_files_are_refused(tmp_path: Path, folder: Path, key: str) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {"tags": "x"}})
    (line,) = problems(file, folder, lines=key)
    name = key.split(" ")[0]
    subset = "[[datasets]] 1 > [[datasets.subsets]] 1"
    assert line == (
        f"data.toml: {subset}: {name}: only for images with caption files, not with metadata_file; remove it"
    )
    if name != "is_reg":
        (line,) = problems(file, folder, dataset=key)
        assert line.startswith(f"data.toml: [[datasets]] 1: {name}: only for")


def test_both_methods_in_one_dataset_are_refused(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {"tags": "x"}})
    (line,) = problems(file, folder, lines=f"[[datasets.subsets]]\nimage_dir = '{folder}'\nclass_tokens = 'cat'")
    assert "some subsets have one and others not" in line


def test_keys_of_caption_files_in_general(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may be for another dataset of the file; if there is none, they are warned of."""
    file = write(tmp_path / "meta.json", {"a.png": {"tags": "x"}})
    other = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    for lines, said in (("", True), (other, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data = load(file, folder, lines=f"{lines}\n[general]\nclass_tokens = 'cat'")
        assert ("class_tokens: has no effect" in caplog.text) == said
    assert [len(dataset.records) for dataset in data.datasets] == [1, 3]


# ---- the command line, recorded metadata, latents of old ----


@pytest.mark.parametrize("with_folder", [True, False])
def test_in_json(tmp_path: Path, folder: Path, with_folder: bool) -> None:
    name = "a.png" if with_folder else str(folder / "a.png")
    file = write(tmp_path / "meta.json", {name: {"caption": "a cat", "tags": "x"}})
    options = DatasetOptions(
        in_json=str(file), train_data_dir=str(folder) if with_folder else None, dataset_repeats=3, resolution="64"
    )
    data = TrainingData(load_dataset_config(None, options), seed=1, latent=SD)
    assert captions(data) == {"a.png": "a cat, x"}
    assert data.datasets[0].num_train == 3
    entries = metadata(data, from_file=False)
    assert entries["ss_dataset_dirs"] == {"meta.json": {"n_repeats": 3, "img_count": 1}}
    assert entries["ss_reg_dataset_dirs"] == {}
    assert entries["ss_tag_frequency"] == {"meta.json": {"a cat": 1, "x": 1}}
    assert "ss_datasets" not in entries


def test_recorded_metadata(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "meta.json", {str(folder / "a.png"): {"tags": "x, X"}})
    for place in (folder, None):
        entries = metadata(load(file, place), from_file=True)
        (dataset,) = entries["ss_datasets"]
        (subset,) = dataset["subsets"]
        assert dataset["is_dreambooth"] is False
        assert dataset["tag_frequency"] == {"meta.json": {"x": 2}}
        assert subset["metadata_file"] == "meta.json"
        assert subset.get("image_dir") == ("images" if place else None)
        assert not {"class_tokens", "is_reg"} & set(subset)
        assert entries["ss_dataset_dirs"] == {"meta.json": {"n_repeats": 1, "img_count": 1}}


def test_latents_are_cached_beside_the_images(tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / "meta.json", {name: {"tags": "x"} for name in IMAGES})

    def encoded() -> int:
        settings = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32"
        data = load(file, folder, dataset=settings, lines="flip_aug = true")
        return data.cache_latents(Encoder, batch_size=1, to_disk=True, vae_identity="vae")

    assert [encoded(), encoded()] == [3, 0]
    # by the name that they had when they were made ahead, for the metadata file; without a stamp, as there was none
    with np.load(folder / "a_0064x0064_sd.npz") as cached:
        arrays = {name: cached[name] for name in cached.files if name != "stamp"}
    (folder / "a_0064x0064_sd.npz").unlink()
    np.savez(folder / "a.npz", **arrays)
    assert encoded() == 0
    # of the first form of all, with an array that has no name, one cannot tell how it was made
    np.savez(folder / "a.npz", arrays["latents"])
    assert encoded() == 1
    assert not (folder / "a_0064x0064_sd.npz").exists()
