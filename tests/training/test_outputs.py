"""The output folder: tried before training, locked, and cleared of nothing but what runs of this name left."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from library.errors import UserError
from library.files.atomic import atomic_directory
from library.training.checkpoints import OutputNames, remove_outdated
from library.training.outputs import only_run, refuse_bad_targets, say_what_is_replaced
from library.training.planned_files import PlannedFile
from library.training.resume import _keep_others


def weights(path: Path) -> PlannedFile:
    return PlannedFile(path, 1)


def state(path: Path) -> PlannedFile:
    return PlannedFile(path, 1, is_state=True)


def check(*files: PlannedFile, averaged: bool = False, tried: bool = True, folders: tuple[Path, ...] = ()) -> None:
    refuse_bad_targets(files, averaged=averaged, folders=folders, tried=tried)


def make_state(folder: Path) -> Path:
    with atomic_directory(folder) as inside:
        (inside / "train_state.json").write_text("{}")
    return folder


def test_what_lies_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file-state").touch()
    (tmp_path / "images-state").mkdir()
    (tmp_path / "images-state" / "1.png").touch()
    with pytest.raises(
        UserError, match=r"folder\.safetensors: is a folder, but a file of weights must be written there"
    ):
        check(weights(tmp_path / "folder.safetensors"))
    with pytest.raises(UserError, match="file-state: is a file, but the folder of a state must be written there"):
        check(state(tmp_path / "file-state"))
    with pytest.raises(UserError, match="images-state: this folder holds no state of training"):
        check(state(tmp_path / "images-state"))
    with pytest.raises(UserError, match=f"{'n' * 300}: cannot be written .File name too long"):
        check(weights(tmp_path / ("n" * 300)))
    with pytest.raises(UserError, match=f"{'n' * 300}: cannot be written .File name too long"):
        check(weights(tmp_path / "to be made" / ("n" * 300)), tried=False)
    with pytest.raises(UserError, match="file-state/x: cannot be written .Not a directory"):
        check(weights(tmp_path / "file-state" / "x"))


def test_averages_lie_beside_weights(tmp_path: Path) -> None:
    (tmp_path / "a-ema.safetensors").mkdir()
    check(weights(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=r"a-ema\.safetensors: is a folder"):
        check(weights(tmp_path / "a.safetensors"), averaged=True)


def test_what_may_be_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty-state").mkdir()
    (tmp_path / "a.safetensors").touch()
    files = [weights(tmp_path / "a.safetensors"), state(tmp_path / "empty-state"), state(make_state(tmp_path / "s"))]
    check(*files)
    with caplog.at_level(logging.WARNING):
        say_what_is_replaced([*files, weights(tmp_path / "new.safetensors")], own={"empty-state"})
    assert f"{tmp_path}: this run will replace a.safetensors, s, which are there" in caplog.text
    caplog.clear()
    say_what_is_replaced([weights(tmp_path / "new.safetensors")], own=())
    assert not caplog.text


def test_many_problems_are_few_lines(tmp_path: Path) -> None:
    files = [weights(tmp_path / f"{n}.safetensors") for n in range(100)]
    for file in files:
        file.path.mkdir()
    with pytest.raises(UserError) as found:
        check(*files)
    assert len(str(found.value).splitlines()) == 4 and "97 more" in str(found.value)


def test_folders_are_listed_instead_of_looking_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of thousands of planned saves would make the start slow, most of all on a network drive."""
    looked: list[str] = []
    with monkeypatch.context() as patch:
        lstat = os.lstat
        patch.setattr(os, "lstat", lambda path, **more: looked.append(str(path)) or lstat(path, **more))
        check(*(weights(tmp_path / f"{n}.safetensors") for n in range(1000)))
    assert 1 <= len(looked) < 10
    (tmp_path / "AB.safetensors").mkdir()
    longer = weights(tmp_path / f"{'n' * 50}.safetensors")
    with pytest.raises(UserError, match=r"AB\.safetensors: is a folder"):
        check(longer, weights(tmp_path / "AB.safetensors"))


def test_folders_are_made_and_tried(tmp_path: Path) -> None:
    check(folders=(tmp_path / "out" / "sample",), tried=False)
    assert not (tmp_path / "out").exists()
    check(folders=(tmp_path / "out" / "sample",))
    assert not list((tmp_path / "out" / "sample").iterdir())
    (tmp_path / "file").touch()
    for tried in (True, False):
        with pytest.raises(UserError, match="file"):
            check(folders=(tmp_path / "file" / "sample",), tried=tried)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for tried in (True, False):
        with pytest.raises(UserError, match="may not be written"):
            check(folders=(tmp_path,), tried=tried)
    tmp_path.chmod(0o700)


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        check(folders=(tmp_path,))


def test_one_run_of_a_name(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, "tiny", "safetensors")
    with only_run(names):
        with pytest.raises(UserError, match="another run .* is writing 'tiny' there"), only_run(names):
            pass
        with only_run(OutputNames(tmp_path, "tiny-2", "safetensors")), only_run(OutputNames(tmp_path, None, "pt")):
            pass
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left(tmp_path: Path) -> None:
    """Own temporary files go, a state that was whole but not yet in place is put there, others' files stay."""
    make_state(tmp_path / "whole").rename(tmp_path / ".tiny-step00000003-state.tmp")
    (tmp_path / ".tiny-step00000004-state.tmp").mkdir()
    (tmp_path / ".tiny-step00000002-state.removed.tmp").mkdir()
    gone = [
        ".tiny.safetensors.tmp",
        ".tiny-000002-ema.safetensors.tmp",
        ".tiny-best.pt.tmp",
        ".tmpAb3dE9",
        ".writable-17",
        "..writable-4.tmp",
    ]
    stay = [
        ".tiny-b.safetensors.tmp",
        ".tiny-000002-b-state.tmp",
        ".other.safetensors.tmp",
        ".tmpFresh0",
        ".tmpmynotes",
    ]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    for name in (".tmpAb3dE9", ".writable-17", "..writable-4.tmp"):
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / ".tmpmynotes", (0, 0))
    with only_run(OutputNames(tmp_path, "tiny", "safetensors")):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {*stay, "tiny-step00000003-state"}


def test_retention_removes_states_and_weights_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b-state").mkdir()
    for name in ("a.safetensors", "b-state"):
        remove_outdated(tmp_path / name)
        assert (tmp_path / name).exists() and f"{name}: kept, as this folder holds no state" in caplog.text
    remove_outdated(make_state(tmp_path / "c-state"))
    assert not (tmp_path / "c-state").exists()


def test_what_came_to_lie_in_a_states_place_is_kept(tmp_path: Path) -> None:
    for place in ("folder-state", "file-state", "state"):
        (tmp_path / f"{place}.1").touch()
    (tmp_path / "folder-state").mkdir()
    (tmp_path / "folder-state" / "1.png").touch()
    (tmp_path / "file-state").touch()
    make_state(tmp_path / "state")
    for place in ("folder-state", "file-state", "state", "none-state"):
        _keep_others(tmp_path / place)
    assert (tmp_path / "folder-state.2" / "1.png").exists() and (tmp_path / "file-state.2").exists()
    assert (tmp_path / "state").exists() and not (tmp_path / "folder-state").exists()
