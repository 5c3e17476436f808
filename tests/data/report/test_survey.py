"""The check of a data set: each thing that may be wrong is found, named and weighed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.architectures.sd import SD
from library.data.report.findings import KINDS, Finding, Report
from library.data.report.options import CheckOptions, not_looked_at
from library.data.report.page import make_page
from library.data.report.survey import check_data
from library.errors import UserError
from library.training.kinds.adapter_options import TrainNetworkOptions
from tests.data.report.test_near_duplicates import scene
from tests.data.samples import dataset_file
from tests.fixtures.tiny_sd import make_tiny_tokenizer

Survey = Callable[..., Report]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five different images with captions, none of which gives cause for a finding at 64 pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, size in enumerate([(64, 64), (80, 80), (128, 32), (96, 96), (64, 64)]):
        scene(100 + seed, size).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"cat, dog, tag{seed}", encoding="utf-8")
    return folder


@pytest.fixture
def survey(tmp_path: Path, folder: Path) -> Survey:
    def check(
        *, dataset: str = "", subset: str = "", more: str = "", wanted: CheckOptions | None = None, **options: object
    ) -> Report:
        path = dataset_file(tmp_path / "data.toml", folder, dataset=dataset, subset=subset, more=more)
        given = TrainNetworkOptions.from_args(argparse.Namespace(dataset_config=path, **options))
        return check_data(given, wanted or CheckOptions(), SD)

    return check


def of_kind(report: Report, kind: str) -> list[Finding]:
    assert kind in KINDS
    return [finding for finding in report.findings if finding.kind == kind]


def names(finding: Finding) -> list[str]:
    return [path.name for path in finding.images]


def test_a_clean_set(survey: Survey) -> None:
    report = survey()
    assert [finding for finding in report.findings if finding.severity != "info"] == []
    assert (report.exit_code(strict=False), report.exit_code(strict=True)) == (0, 0)
    assert report.tags["cat"] == 5 and report.tags["tag3"] == 1 and list(report.tags)[0] in ("cat", "dog")
    assert dict(report.summary)["images"] == "5"
    # 4 squares in batches of 2 and one wide image
    assert dict(report.summary)["steps an epoch"].startswith("3 with one process (3 batches)")
    assert [(row.size, row.images, row.batches) for row in report.buckets] == [((64, 64), 4, 2), ((128, 32), 1, 1)]
    assert "not counted" in report.notes[0] and report.images[0].tokens is None


def test_images_that_cannot_be_read(survey: Survey, folder: Path) -> None:
    (folder / "0.png").write_bytes(b"")
    damaged = bytearray((folder / "1.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # header and end are whole: it shows only when the image is decoded
    (folder / "1.png").write_bytes(damaged)
    report = survey()
    assert sorted(name for finding in of_kind(report, "unreadable") for name in names(finding)) == ["0.png", "1.png"]
    assert all(str(folder) not in finding.text for finding in of_kind(report, "unreadable"))
    assert report.exit_code(strict=False) == 1
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    report = survey(subset="face_crop_aug_range = [2, 4]")
    assert len(of_kind(report, "unreadable")) == 5 and report.buckets == []


def test_captions(survey: Survey, folder: Path) -> None:
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text("  \n", encoding="utf-8")
    (folder / "2.txt").write_bytes(b"\xff\xfe\xff")
    report = survey()
    assert [names(finding) for finding in of_kind(report, "caption_missing")] == [["0.png"]]
    assert [names(finding) for finding in of_kind(report, "caption_empty")] == [["1.png"]]
    (unreadable,) = of_kind(report, "data")
    assert names(unreadable) == ["2.png"] and "not UTF-8" in unreadable.text
    assert report.count("error") == 2
    # class tokens stand in for the missing one
    assert of_kind(survey(subset="class_tokens = 'cat'"), "caption_missing") == []


def test_captions_beside_class_tokens(survey: Survey) -> None:
    (found,) = of_kind(survey(subset="class_tokens = 'sks cat'\ncaption_extension = '.caption'"), "settings")
    assert "5 .txt files" in found.text and "caption_extension" in found.text


def test_what_is_cut_off_captions(survey: Survey, folder: Path, tmp_path: Path) -> None:
    wanted = CheckOptions(tokenizer=make_tiny_tokenizer(tmp_path / "tokenizer"))
    long = ", ".join(["cat"] * 40)  # 79 tokens with the commas
    (folder / "0.txt").write_text(f"{long}, dog", encoding="utf-8")
    report = survey(wanted=wanted)
    (found,) = of_kind(report, "caption_too_long")
    assert names(found) == ["0.png"] and found.severity == "warning"
    assert "81 tokens, of which 75 are used" in found.text
    assert found.detail == ", cat, cat, dog"  # 75 tokens end with the 38th cat
    assert report.notes == []
    assert {row.path.name: row.tokens for row in report.images}["0.png"] == 81
    assert of_kind(survey(wanted=wanted, max_token_length=150), "caption_too_long") == []
    # the prefix counts; what the longest choice adds counts too
    (folder / "0.txt").write_text("dog", encoding="utf-8")
    report = survey(wanted=wanted, subset=f"enable_wildcard = true\ncaption_prefix = '{{dog|{long}}}'")
    assert [names(finding) for finding in of_kind(report, "caption_too_long")] == [[f"{n}.png"] for n in range(5)]


def test_equal_and_similar_images(survey: Survey, folder: Path, tmp_path: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    scene(103, (96, 96)).save(folder / "like.jpg", quality=80)
    for name in ("copy", "like"):
        (folder / f"{name}.txt").write_text("cat, dog, tag3", encoding="utf-8")
    report = survey()
    (equal,) = of_kind(report, "duplicate")
    assert names(equal) == ["3.png", "copy.png"] and equal.text == "2 equal files"
    (alike,) = of_kind(report, "near_duplicate")
    assert "like.jpg" in names(alike) and len(names(alike)) == 2
    assert (report.exit_code(strict=False), report.exit_code(strict=True)) == (0, 1)
    assert of_kind(survey(wanted=CheckOptions(hash_distance=0)), "duplicate")
    (folder / "copy.txt").write_text("another", encoding="utf-8")
    assert of_kind(survey(), "duplicate")[0].text == "2 equal files, captions differ"


def test_regularization_images_that_are_trained_on(survey: Survey, folder: Path, tmp_path: Path) -> None:
    reg = tmp_path / "reg"
    reg.mkdir()
    (reg / "same.png").write_bytes((folder / "0.png").read_bytes())
    scene(103, (200, 200)).save(reg / "like.png")
    scene(500, (64, 64)).save(reg / "other.png")
    more = f"[[datasets.subsets]]\nimage_dir = '{reg}'\nclass_tokens = 'cat'\nis_reg = true"
    report = survey(more=more)
    found = {tuple(names(finding)): finding for finding in of_kind(report, "leakage")}
    assert found.keys() == {("same.png", "0.png"), ("like.png", "3.png")}
    assert all(finding.severity == "error" for finding in found.values())
    assert "regularization and training" in found["same.png", "0.png"].text
    assert of_kind(report, "duplicate") == of_kind(report, "near_duplicate") == []  # each is named once
    (one,) = of_kind(survey(more=more.replace(str(reg), str(folder)), subset="num_repeats = 1"), "leakage")[:1]
    assert "one file on both sides" in one.text


def test_validation_images_that_are_trained_on(survey: Survey, folder: Path) -> None:
    """A file is never on both sides, but a copy may be."""
    for place in range(5):
        (folder / f"copy{place}.png").write_bytes((folder / f"{place}.png").read_bytes())
        (folder / f"copy{place}.txt").write_text("the same", encoding="utf-8")
    report = survey(dataset="validation_split = 0.5", seed=1)
    kept = {row.path.name for row in report.images if row.validation}
    assert len(kept) == 5 == len(report.images) - 5
    found = {tuple(sorted(names(finding))) for finding in of_kind(report, "leakage")}
    pairs = {(f"{place}.png", f"copy{place}.png") for place in range(5)}
    assert found == {pair for pair in pairs if len(kept & {*pair}) == 1} and found
    assert all("validation and training: equal files" == f.text for f in of_kind(report, "leakage"))
    assert sum(row.images for row in report.buckets) == 5


def test_sizes(survey: Survey, folder: Path) -> None:
    scene(200, (32, 32)).save(folder / "0.png")
    scene(201, (62, 62)).save(folder / "1.png")
    scene(202, (400, 40)).save(folder / "2.png")
    report = survey()
    enlarged = {names(finding)[0]: finding.severity for finding in of_kind(report, "enlarged")}
    assert enlarged == {"0.png": "warning", "1.png": "info"}
    (cut,) = of_kind(report, "crop")
    assert names(cut) == ["2.png"] and cut.text.startswith("60% of the area is cut off: 400x40")
    rows = {row.path.name: row for row in report.images}
    assert rows["0.png"].scale == 2 and rows["2.png"].crop_loss == pytest.approx(0.6)
    assert next(row.mean_crop_loss for row in report.buckets if row.size == (128, 32)) == pytest.approx(0.6)
    assert [finding.text for finding in of_kind(report, "buckets")] == [
        "dataset 1: 128x32 has 1 image for batches of 2"
    ]


def test_turned_images(survey: Survey, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    scene(210, (32, 128)).save(folder / "2.png", exif=exif)
    (found,) = of_kind(survey(), "turned")
    assert names(found) == ["2.png"] and found.severity == "info"


def test_masks(survey: Survey, folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(5):
        with Image.open(folder / f"{number}.png") as image:
            Image.new("L", image.size, 255).save(masks / f"{number}.png")
    subset = f"conditioning_data_dir = '{masks}'"
    assert of_kind(survey(subset=subset), "masks") == []
    Image.new("L", (8, 8)).save(masks / "extra.png")
    (extra,) = of_kind(survey(subset=subset), "masks")
    assert "extra.png" in extra.text and extra.severity == "error"
    (masks / "1.png").unlink()
    Image.new("L", (128, 64)).save(masks / "2.png")
    found = of_kind(survey(subset=subset), "masks")
    assert any("1.png" in finding.text and finding.severity == "error" for finding in found)


def test_settings_and_wrong_files(survey: Survey, folder: Path, tmp_path: Path) -> None:
    report = survey(subset="alpha_mask = true\nkeep_tokens = 1")
    assert sorted(finding.text.split(": ", 2)[2].split(" ")[0] for finding in of_kind(report, "settings")) == [
        "alpha_mask",
        "keep_tokens",
    ]
    with pytest.raises(UserError, match="flip_agu: unknown key"):
        survey(subset="flip_agu = true")
    with pytest.raises(UserError, match="no data"):
        check_data(TrainNetworkOptions.from_args(argparse.Namespace()), CheckOptions(), SD)
    with pytest.raises(UserError, match="--tokenizer"):
        survey(wanted=CheckOptions(tokenizer=folder))
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps({"0.png": {"caption": "cat"}, "gone.png": {"caption": "dog"}}), encoding="utf-8")
    options = argparse.Namespace(in_json=str(metadata), train_data_dir=str(folder), resolution="64")
    report = check_data(TrainNetworkOptions.from_args(options), CheckOptions(), SD)
    (found,) = of_kind(report, "data")
    assert "gone.png" in found.text and found.severity == "error"


def test_what_is_not_looked_at() -> None:
    options = TrainNetworkOptions.from_args(
        argparse.Namespace(network_dim=4, vae_batch_size=2, resolution="64", max_token_length=150, full_bf16=True)
    )
    assert sorted(not_looked_at(options)) == ["--full_bf16", "--network_dim", "--vae_batch_size"]


# ---- the page ----


class _Balance(HTMLParser):
    """The open elements, and those that were closed in a wrong place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_whole_and_harmless(survey: Survey, folder: Path) -> None:
    evil = '<script>alert("x")</script>&"\''
    (folder / "0.txt").write_text(evil, encoding="utf-8")
    name = "<b onmouseover=a>.png"
    scene(300, (64, 64)).save(folder / name)
    (folder / name).with_suffix(".txt").write_text("cat", encoding="utf-8")
    report = survey()
    page = make_page(report, max_thumbnails=100)
    assert "<script" not in page and "<b onmouseover" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page and "&lt;b onmouseover=a&gt;.png" in page
    assert page.count("data:image/jpeg;base64,") >= 6
    assert "http://" not in page and "https://" not in page and " src=" in page
    assert (_Balance(page).open, _Balance(page).wrong) == ([], [])
    few = make_page(report, max_thumbnails=2)
    assert "4 small images were left out" in few
    shown = {part.split('"')[0] for part in few.split('src="')[1:]}
    assert len(shown) == 2
    assert "data:image" not in make_page(report, max_thumbnails=0)


def test_names_that_are_no_text(survey: Survey, folder: Path) -> None:
    report = survey()
    row = replace(report.images[0], path=Path("/x/\udcff.png"), caption="c")
    report = replace(report, images=[row], findings=[Finding("crop", "warning", "t", (row.path,))])
    make_page(report, max_thumbnails=5).encode("utf-8")
    json.dumps(report.as_json(), ensure_ascii=False).encode("utf-8")


def test_the_frame_shows_what_is_left(folder: Path, survey: Survey) -> None:
    import base64
    import io

    from library.data.report.page import thumbnail

    Image.fromarray(np.zeros((160, 640, 3), np.uint8)).save(folder / "2.png")
    row = next(row for row in survey(dataset="enable_bucket = false").images if row.path.name == "2.png")
    uri = thumbnail(row.path, row)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as small:
        assert small.size == (160, 40)  # the 64x64 bucket keeps the middle 40x40
        red = np.asarray(small.convert("RGB"))[20, :, 0] > 60
    assert red[59:62].any() and red[98:101].any() and not red[:55].any() and not red[65:95].any()
