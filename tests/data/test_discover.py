"""Images and captions of a folder are found; messages name missing ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.data import discover
from library.data.dataset import TrainingData
from library.data.image_io import read_size
from library.errors import UserError
from tests.data.samples import SIZES, draw

Make = Callable[..., TrainingData]


def captions(data: TrainingData) -> dict[str, str]:
    return {record.path.name: record.caption for record in data.datasets[0].records}


def test_images_are_found_in_the_order_of_their_names(make_data: Make, folder: Path) -> None:
    draw(folder, {"H.PNG": (64, 64), "i.bmp": (64, 64), "j.jpeg": (64, 64)})
    (folder / "notes.md").write_text("x")
    (folder / "k.png").mkdir()
    records = make_data().datasets[0].records
    assert [r.path.name for r in records] == ["H.PNG", *SIZES, "i.bmp", "j.jpeg"]
    assert records[4].size == (128, 32)


def test_a_turned_image_is_sized_as_seen(make_data: Make, folder: Path) -> None:
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


def test_caption_of_a_cropped_image(make_data: Make, folder: Path) -> None:
    """A name of five or more parts falls back to the caption without its last four."""
    Image.new("RGB", (64, 64)).save(folder / "x_y_10_20_30_40.png")
    (folder / "x_y.txt").write_text("of the whole")
    assert captions(make_data())["x_y_10_20_30_40.png"] == "of the whole"


def test_missing_captions_name_the_first_images(make_data: Make, folder: Path) -> None:
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
    assert "a.png: not an image" in lines[0]
    assert "b.txt: is not UTF-8" in lines[1]
    assert "x.png: the file is empty" in lines[2]


def test_every_unreadable_image_is_named_and_nothing_else_is_said_of_it(make_data: Make, folder: Path) -> None:
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    for name in names:
        (folder / name).write_text("")
    (folder / "a.txt").unlink()
    (folder / "f.jpg").write_bytes((folder / "f.jpg").read_bytes()[:-30])
    with pytest.raises(UserError) as error:
        make_data()
    lines = str(error.value).splitlines()
    assert [Path(line.split(": ")[0]).name for line in lines] == [*names, "f.jpg"]
    assert "cannot be read (image file is truncated" in lines[5]


def test_many_unreadable_captions_are_counted(make_data: Make, folder: Path) -> None:
    for name in "abcde":
        (folder / f"{name}.txt").write_bytes(b"\xff")
    with pytest.raises(UserError) as error:
        make_data()
    assert len(str(error.value).splitlines()) == 4
    assert "and 2 more captions like these" in str(error.value)


def test_images_that_cannot_be_read_are_left_out_if_asked(
    make_data: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "b.png").write_text("<html>")
    (folder / "b.txt").unlink()  # a caption that is not needed
    (folder / "f.jpg").write_bytes(b"")
    data = make_data(on_bad_image="skip", subset="num_repeats = 2")
    dataset = data.datasets[0]
    assert [r.name for r in dataset.records] == ["a.png", "c.png", "d.png", "e.png", "g.webp"]
    assert (dataset.num_train, len(dataset.uses), data.image_count()) == (10, 10, 5)
    used = [use.record for ref in data.batches(0) for use in ref.uses]
    assert sorted(used) == sorted(2 * list(range(5)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'b.png'}: not an image; remove or replace it; left out (--on_bad_image skip)",
        f"{folder / 'f.jpg'}: the file is empty (0 bytes); remove or replace it; left out (--on_bad_image skip)",
    ]


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_a_folder_of_several_datasets_is_read_once(
    make_data: Make,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_bad_image: str,
) -> None:
    read: list[str] = []
    monkeypatch.setattr(discover, "read_size", lambda path: read.append(path) or read_size(path))
    if on_bad_image == "skip":
        (folder / "b.png").write_text("<html>")
    more = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'"
    data = make_data(more=more, on_bad_image=on_bad_image)
    assert data.datasets[0].records == data.datasets[1].records
    assert sorted(read) == [str(folder / name) for name in SIZES]
    assert len(caplog.records) == (1 if on_bad_image == "skip" else 0)


def test_a_folder_without_any_readable_image_stops_the_run(make_data: Make, folder: Path) -> None:
    for name in SIZES:
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"subsets\]\] 1: image_dir: .*none of its {len(SIZES)} images can be read$"):
        make_data(on_bad_image="skip")


def test_hidden_files_are_no_images_and_lost_links_are_named(make_data: Make, folder: Path) -> None:
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")  # as macOS leaves them on other disks
    make_data()
    (folder / "lost.png").symlink_to(folder / "gone.png")
    with pytest.raises(UserError, match=r"lost.png: the image cannot be read \(No such file"):
        make_data()


def test_order_and_records_are_the_same_in_threads(
    make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(folder, {f"more_{i:03d}.png": (64 + i, 64) for i in range(40)})
    expected = make_data().datasets[0].records
    monkeypatch.setattr(discover, "_SLOW", 0.0)
    monkeypatch.setattr(discover, "_CHUNK", 3)
    threads: set[int] = set()

    def slow(path: str) -> tuple[int, int]:
        threads.add(threading.get_ident())
        time.sleep(0.001)
        return read_size(path)

    monkeypatch.setattr(discover, "read_size", slow)
    assert make_data().datasets[0].records == expected
    assert len(threads) >= 2  # this one, and others


def test_captions_have_plain_line_ends(make_data: Make, folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert captions(make_data())["a.png"] == "one\ntwo\nthree"
