"""Which pictures and captions of a folder are found, and what is said when some are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.data.dataset import TrainingData
from library.errors import UserError
from tests.data.samples import SIZES, draw

Make = Callable[..., TrainingData]


def captions(data: TrainingData) -> dict[str, str]:
    return {record.path.name: record.caption for record in data.datasets[0].records}


def test_pictures_are_found_in_the_order_of_their_names(make_data: Make, folder: Path) -> None:
    draw(folder, {"H.PNG": (64, 64), "i.bmp": (64, 64), "j.jpeg": (64, 64)})
    (folder / "notes.md").write_text("x")
    (folder / "k.png").mkdir()
    records = make_data().datasets[0].records
    assert [r.path.name for r in records] == ["H.PNG", *SIZES, "i.bmp", "j.jpeg"]
    assert records[4].size == (128, 32)


def test_a_turned_picture_is_sized_as_seen(make_data: Make, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 32)).save(folder / "z.jpg", exif=exif)
    (folder / "z.txt").write_text("turned")
    dataset = make_data().datasets[0]
    assert dataset.records[-1].size == (32, 128)
    assert dataset.bucket_of[-1] == (32, 128)


def test_class_tokens_stand_in_for_missing_captions(make_data: Make, folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("\ufeff one \n two\n", encoding="utf-8")
    (folder / "c.txt").write_text("")
    found = captions(make_data(subset="class_tokens = 'sks cat'"))
    assert found["a.png"] == "sks cat"
    assert found["b.png"].splitlines() == ["one ", " two"]
    assert found["c.png"] == ""  # an empty caption is one
    assert found["d.png"] == "cat, dog, d"


def test_caption_of_a_cropped_picture(make_data: Make, folder: Path) -> None:
    """A name of five or more parts falls back to the caption without its last four."""
    Image.new("RGB", (64, 64)).save(folder / "x_y_10_20_30_40.png")
    (folder / "x_y.txt").write_text("of the whole")
    assert captions(make_data())["x_y_10_20_30_40.png"] == "of the whole"


def test_missing_captions_name_the_first_pictures(make_data: Make, folder: Path) -> None:
    for name in "abcde":
        (folder / f"{name}.txt").unlink()
    with pytest.raises(UserError) as error:
        make_data()
    assert "no caption file (.txt) for a.png, b.png, c.png and 2 more" in str(error.value)
    assert "class_tokens" in str(error.value)


def test_all_unreadable_files_of_all_datasets_are_named_once(make_data: Make, folder: Path, tmp_path: Path) -> None:
    (folder / "a.png").write_text("<html>")
    (folder / "b.txt").write_bytes(b"\xff\xfe\xff")
    other = draw(tmp_path / "other", {"x.png": (64, 64)})
    (other / "x.png").write_bytes(b"")
    subsets = [f"[[datasets.subsets]]\nimage_dir = '{path}'" for path in (folder, other)]
    more = "\n".join(["[[datasets]]", "resolution = 32", *subsets])
    with pytest.raises(UserError) as error:
        make_data(more=more)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "a.png: not a picture" in lines[0]
    assert "b.txt: is not UTF-8" in lines[1]
    assert "x.png: not a picture" in lines[2]


def test_many_unreadable_files_are_counted(make_data: Make, folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        (folder / name).write_text("")
    with pytest.raises(UserError) as error:
        make_data()
    assert len(str(error.value).splitlines()) == 4
    assert "and 2 more files" in str(error.value)
