"""``metadata_cache.json``: what is remembered of a folder, and when it is read again."""

from __future__ import annotations

import json
import logging
import marshal
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from library.data import discover as module
from library.data import stamp_ahead
from library.data.dataset import TrainingData
from library.data.image_folder import ImageFolder
from library.data.image_io import EXTENSIONS, read_size
from library.data.metadata_cache import NAME
from library.data.stamp_ahead import StampsAhead, has_caption
from tests.data.samples import SIZES

Make = Callable[..., TrainingData]

ON = "cache_info = true"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened, images and captions."""
    names: list[str] = []

    def counting(function: Callable[[str], object]) -> Callable[[str], object]:
        def call(path: str) -> object:
            names.append(Path(path).name)
            return function(path)

        return call

    monkeypatch.setattr(module, "read_size", counting(read_size))
    monkeypatch.setattr(module, "read_caption", counting(module.read_caption))
    return names


def table(folder: Path) -> dict[str, dict]:
    return json.loads((folder / NAME).read_text(encoding="utf-8"))


def test_off_writes_and_reads_nothing(make_data: Make, folder: Path) -> None:
    make_data()
    assert not (folder / NAME).exists()
    (folder / NAME).write_text("{", encoding="utf-8")
    make_data()
    assert (folder / NAME).read_text(encoding="utf-8") == "{"


def test_the_published_layout(make_data: Make, folder: Path) -> None:
    make_data(subset=ON)
    found = table(folder)
    assert list(found) == [str(folder / name) for name in SIZES]
    for name, size in SIZES.items():
        entry = found[str(folder / name)]
        assert entry["resolution"] == list(size)
        assert entry["caption"] == f"cat, dog, {Path(name).stem}"


@pytest.mark.parametrize("where", ["key", "flag"])
def test_the_second_time_no_file_is_opened(make_data: Make, folder: Path, read: list[str], where: str) -> None:
    on = {"subset": ON} if where == "key" else {"cache_info": True}
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 32)).save(folder / "z.jpg", exif=exif)
    (folder / "z.txt").write_text("katze, größe", encoding="utf-8")
    first = make_data(**on).datasets[0]
    assert len(read) == 2 * len(first.records)
    read.clear()
    time = (folder / NAME).stat().st_mtime_ns
    second = make_data(**on).datasets[0]
    assert read == []
    assert second.records == first.records
    assert second.records[-1].size == (32, 128)  # as it is seen
    assert (folder / NAME).stat().st_mtime_ns == time


def test_what_changed_is_read_again(make_data: Make, folder: Path, read: list[str]) -> None:
    make_data(subset=ON)
    read.clear()
    Image.new("RGB", (96, 33)).save(folder / "a.png")
    (folder / "b.txt").write_text("another", encoding="utf-8")
    time = (folder / "c.txt").stat().st_mtime_ns
    (folder / "c.txt").write_text("cat, dog, x", encoding="utf-8")  # of the same length
    os.utime(folder / "c.txt", ns=(time, time + 1))
    records = make_data(subset=ON).datasets[0].records
    assert records[0].size == (96, 33)
    assert [r.caption for r in records[1:3]] == ["another", "cat, dog, x"]
    assert set(read) == {f"{stem}{ending}" for stem in "abc" for ending in (".png", ".txt")}
    read.clear()
    make_data(subset=ON)
    assert read == []


def test_images_come_and_go(make_data: Make, folder: Path, read: list[str]) -> None:
    make_data(subset=ON)
    read.clear()
    (folder / "a.png").unlink()
    Image.new("RGB", (64, 64)).save(folder / "new.png")
    (folder / "new.txt").write_text("new", encoding="utf-8")
    make_data(subset=ON)
    assert sorted(read) == ["new.png", "new.txt"]
    assert [Path(path).name for path in table(folder)] == [*list(SIZES)[1:], "new.png"]


def test_a_caption_file_that_comes_or_goes(make_data: Make, folder: Path) -> None:
    on = f"{ON}\nclass_tokens = 'sks cat'"
    (folder / "a.txt").unlink()
    assert make_data(subset=on).datasets[0].records[0].caption == "sks cat"
    other = make_data(subset=on.replace("sks", "shs"))
    assert other.datasets[0].records[0].caption == "shs cat"
    (folder / "a.txt").write_text("now", encoding="utf-8")
    assert make_data(subset=on).datasets[0].records[0].caption == "now"
    (folder / "a.txt").unlink()
    assert make_data(subset=on).datasets[0].records[0].caption == "sks cat"


def test_captions_of_another_ending_are_not_mixed_up(make_data: Make, folder: Path) -> None:
    for name in SIZES:
        old, new = (folder / name).with_suffix(".txt"), (folder / name).with_suffix(".tag")
        new.write_text("x" * old.stat().st_size, encoding="utf-8")
        time = old.stat().st_mtime_ns
        os.utime(new, ns=(time, time))
    make_data(subset=ON)
    records = make_data(subset=f"{ON}\ncaption_extension = '.tag'").datasets[0].records
    assert set(records[0].caption) == {"x"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"a.png": 1}', b"[" * 100_000, b'{"": {}}'],
    ids=lambda c: repr(c[:8]),
)
def test_a_damaged_file_is_made_again(make_data: Make, folder: Path, content: bytes) -> None:
    expected = make_data().datasets[0].records
    (folder / NAME).write_bytes(content)
    assert make_data(subset=ON).datasets[0].records == expected
    assert len(table(folder)) == len(SIZES)


DAMAGE = {
    "resolution": [[0, 64], [64], [64, 64, 64], ["64", "64"], [64.0, 64.0], None, "64x64", [True, True]],
    "caption": [None, 3, ["cat"]],
    "read_from": [None, 3, "", "1 2"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in DAMAGE.items() for v in values])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_entry_is_read_again(
    make_data: Make, folder: Path, read: list[str], key: str, value: object, missing: bool
) -> None:
    expected = make_data(subset=ON).datasets[0].records
    found = table(folder)
    found[str(folder / "a.png")][key] = value
    if missing:
        del found[str(folder / "a.png")][key]
    (folder / NAME).write_text(json.dumps(found), encoding="utf-8")
    read.clear()
    assert make_data(subset=ON).datasets[0].records == expected
    assert sorted(read) == ["a.png", "a.txt"]


def test_files_of_the_predecessor_are_read_again_and_kept_readable_for_it(make_data: Make, folder: Path) -> None:
    """Theirs do not say what they were made from, and give sizes before the turn by EXIF."""
    old = {str(folder / name): {"caption": "old", "resolution": [7, 7]} for name in SIZES}
    (folder / NAME).write_text(json.dumps(old), encoding="utf-8")
    records = make_data(subset=ON).datasets[0].records
    assert [r.size for r in records] == list(SIZES.values())
    assert records[0].caption == "cat, dog, a"
    assert list(table(folder)) == list(old)


def test_a_folder_that_was_moved_keeps_its_memory(
    make_data: Make, folder: Path, read: list[str], tmp_path: Path
) -> None:
    make_data(subset=ON)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    folder.symlink_to(moved)
    (moved / NAME).write_text((moved / NAME).read_text().replace(str(folder), "C:\\\\old\\\\place"), encoding="utf-8")
    read.clear()
    make_data(subset=ON)
    assert read == []


def test_unreadable_images_are_not_remembered(make_data: Make, folder: Path, read: list[str]) -> None:
    (folder / "a.png").write_text("<html>", encoding="utf-8")
    for _ in range(2):
        read.clear()
        make_data(subset=ON, on_bad_image="skip")
        assert str(folder / "a.png") not in table(folder)
        assert "a.png" in read
    assert read == ["a.png", "a.txt"]


def test_what_could_be_read_is_remembered_although_the_run_stops(make_data: Make, folder: Path) -> None:
    (folder / "a.png").write_text("<html>", encoding="utf-8")
    with pytest.raises(Exception, match="a.png"):
        make_data(subset=ON)
    assert len(table(folder)) == len(SIZES) - 1


def test_a_folder_that_may_not_be_written_is_used_all_the_same(
    make_data: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    # the tests may run as root, whom no folder refuses
    monkeypatch.setattr("library.files.atomic.os.replace", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(make_data(subset=ON).datasets[0].records) == len(SIZES)
    assert f"{folder / NAME}: may not be written" in caplog.text
    assert not list(folder.glob("*.json")) and not list(folder.glob(".*"))


@pytest.mark.parametrize("second", ["works", "fails", "cannot start"])
def test_with_a_second_process_what_changed_is_read_again_all_the_same(
    make_data: Make, folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    monkeypatch.setattr("library.data.metadata_cache._MANY", 0)
    if second == "fails":
        monkeypatch.setattr("library.data.stamp_ahead.__file__", str(folder / "a.txt"))
    elif second == "cannot start":
        monkeypatch.setattr("library.data.stamp_ahead.sys.executable", str(folder / "no python"))
    first = make_data(subset=ON).datasets[0].records
    read.clear()
    assert make_data(subset=ON).datasets[0].records == first
    assert read == []
    for name in SIZES:  # each is stamped by one process or the other
        Image.new("RGB", (96, 33)).save(folder / name)
        read.clear()
        records = make_data(subset=ON).datasets[0].records
        assert [r.size for r in records if r.name == name] == [(96, 33)]
        assert read[0] == name and len(read) == 2
        (folder / name).with_suffix(".txt").write_text(f"another {name}", encoding="utf-8")
        assert f"another {name}" in [r.caption for r in make_data(subset=ON).datasets[0].records]


def test_the_second_process_stamps_as_the_first_would(folder: Path) -> None:
    (folder / "more.d").mkdir()
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "alone.WEBP").write_bytes(b"without a caption")
    (folder / "cut_0_0_8_8.jpg").write_bytes(b"its caption is that of the whole")
    (folder / "cut.txt").write_text("a whole", encoding="utf-8")
    with ImageFolder(folder, ".txt") as files:
        assert {"alone.WEBP", "cut_0_0_8_8.jpg"} < set(files.images)
        stamps = dict(files.stamped(files.images))
    assert stamps["alone.WEBP"].split()[0] == "17" and not has_caption(stamps["alone.WEBP"])
    assert stamps["cut_0_0_8_8.jpg"].endswith(" cut.txt") and has_caption(stamps["cut_0_0_8_8.jpg"])
    ahead = StampsAhead(folder, ".txt", EXTENSIONS)
    try:
        deadline = time.monotonic() + 30
        while len(ahead.stamps()) < len(stamps) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ahead.stamps() == stamps
    finally:
        ahead.stop()


def test_it_delivers_the_last_names_first_and_each_block_by_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamp_ahead, "_BLOCK", 1)
    file = tmp_path / "delivered"
    with open(file, "wb", buffering=0) as to:
        stamp_ahead.deliver_stamps(str(folder), ".txt", EXTENSIONS, to.fileno())
    names, content = [], file.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        names += marshal.loads(content[8 : 8 + length])
        content = content[8 + length :]
    assert names == sorted(SIZES, reverse=True)


@pytest.mark.parametrize("subset", [ON, "cache_info = false"])
def test_a_folder_that_is_named_like_a_image_is_none(make_data: Make, folder: Path, subset: str) -> None:
    (folder / "folder.png").mkdir()
    for _ in range(2):
        records = make_data(subset=subset).datasets[0].records
        assert sorted(r.name for r in records) == sorted(SIZES)


def test_a_block_that_is_still_being_written_is_waited_for(folder: Path) -> None:
    ahead = StampsAhead(folder, ".txt", EXTENSIONS)
    with tempfile.TemporaryFile(buffering=0) as delivered:
        ahead._process.wait()
        ahead._delivered = delivered
        block = marshal.dumps({"a.png": "1 2"})
        whole = len(block).to_bytes(8, "little") + block
        delivered.write(whole[:-1])
        assert ahead.stamps() == {}
        delivered.write(whole[-1:])
        assert ahead.stamps() == {"a.png": "1 2"}
