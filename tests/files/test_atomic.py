"""Files and folders that appear whole or not at all, with real files and a real full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.files.atomic import (
    MANIFEST_NAME,
    atomic_directory,
    atomic_path,
    make_folder,
    read_manifest,
    recover_directory,
    remove_tree,
    verify_directory,
    write_bytes,
    write_text,
)


def only(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_new_file_and_its_replacement(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"one")
    write_text(target, "zwei")
    assert target.read_bytes() == b"zwei"
    assert only(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
def test_files_have_the_rights_of_new_ones(tmp_path: Path) -> None:
    """A web UI that runs as another user must be able to read a LoRA; safetensors makes files for their owner alone."""
    import torch

    from library.files.safetensors_io import save_tensors

    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    with atomic_directory(tmp_path / "state") as folder:
        save_tensors(folder / "b.safetensors", {"b": torch.zeros(1)})
        (folder / "c").touch(mode=0o600)
    for name in ("a.safetensors", "state/b.safetensors", "state/c", f"state/{MANIFEST_NAME}"):
        assert (tmp_path / name).stat().st_mode == usual, name


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_bytes(b"half")
        assert target.read_bytes() == b"old"
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert only(tmp_path) == ["a.bin"]


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    program = (
        "import os,sys,signal\nfrom library.files.atomic import atomic_path\n"
        f"with atomic_path({str(target)!r}) as p:\n"
        "    p.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    assert not target.exists() and len(only(tmp_path)) == 1
    write_bytes(target, b"whole")
    assert only(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("by_many", [False, True])
def test_names_may_be_as_long_as_they_can_be(tmp_path: Path, by_many: bool) -> None:
    path = tmp_path / ("あ" * 85)  # 255 bytes
    for text in ("old", "new"):
        write_text(path, text, by_many=by_many)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "new")]
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / ("x" * 255)):
        raise RuntimeError
    with atomic_directory(tmp_path / ("x" * 255)) as folder:
        (folder / "a").touch()
    remove_tree(tmp_path / ("x" * 255))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_several_may_write_one_file_at_once(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic_path(target, by_many=True) as one, atomic_path(target, by_many=True) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert target.read_bytes() == b"one"  # the last to finish
    assert only(tmp_path) == ["a.bin"]


def test_leftovers_of_one_of_many_are_cleared_when_they_are_old(tmp_path: Path) -> None:
    old, new, others = (tmp_path / f".{name}.0123.tmp" for name in ("a.bin", "a.bin.x", "b.bin"))
    for path in (old, new, others):
        path.touch()
    for path in (old, others):
        os.utime(path, (0, 0))
    write_text(tmp_path / "a.bin", "x", by_many=True)
    assert only(tmp_path) == sorted([".a.bin.x.0123.tmp", ".b.bin.0123.tmp", "a.bin"])


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are POSIX")
def test_a_limit_of_file_sizes_is_one_clear_line(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    program = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from library.errors import UserError\nfrom library.files.atomic import write_bytes\n"
        f"try:\n    write_bytes({str(target)!r}, b'x' * 5000)\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "a.bin: larger than a file may be here; raise the limit (ulimit -f)" in done.stdout
    assert target.read_bytes() == b"old"
    assert only(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_one_clear_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=r"a: the disk is full \(\d+ MB free\); what was there"):
        with atomic_path(tmp_path / "a"):
            raise OSError(number, "full")
    with pytest.raises(UserError, match="a: the disk is full"), atomic_path(tmp_path / "a"):
        raise RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file")


def test_other_errors_of_the_disk_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a: cannot be written \(Input/output error\)"), atomic_path(tmp_path / "a"):
        raise OSError(errno.EIO, "odd")
    with pytest.raises(ValueError, match="odd"), atomic_path(tmp_path / "a"):
        raise ValueError("odd")


def make(folder: Path, content: bytes = b"weights") -> Path:
    with atomic_directory(folder) as inside:
        assert not folder.exists() or (folder / MANIFEST_NAME).exists()
        (inside / "model.bin").write_bytes(content)
        (inside / "deep").mkdir()
        (inside / "deep" / "more.txt").write_text("more")
    return folder


def test_a_folder_has_a_manifest(tmp_path: Path) -> None:
    folder = make(tmp_path / "state")
    assert set(read_manifest(folder)) == {"model.bin", "deep/more.txt"}
    verify_directory(folder)
    assert only(tmp_path) == ["state"]


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / "state")
    make(tmp_path / "state", b"newer")
    assert (tmp_path / "state" / "model.bin").read_bytes() == b"newer"
    assert only(tmp_path) == ["state"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    make(tmp_path / "state")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "state") as inside:
        (inside / "model.bin").write_bytes(b"half")
        raise RuntimeError
    verify_directory(tmp_path / "state")
    assert only(tmp_path) == ["state"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "model.bin").unlink(), "model.bin is missing"),
        (lambda p: (p / "model.bin").write_bytes(b"weig"), "4 of 7 bytes"),
        (lambda p: (p / "model.bin").write_bytes(b"WEIGHTS"), "has changed"),
        (lambda p: (p / MANIFEST_NAME).write_text("{"), "no readable manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, words: str) -> None:
    folder = make(tmp_path / "state")
    damage(folder)
    with pytest.raises(UserError, match=words):
        verify_directory(folder)


def test_remove_tree(tmp_path: Path) -> None:
    remove_tree(make(tmp_path / "state"))
    assert only(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are POSIX")
def test_a_limit_of_file_sizes_whoever_writes(tmp_path: Path) -> None:
    """Python, safetensors and torch each say it in their own way."""
    target = tmp_path / "a.safetensors"
    program = f"""
import resource, signal, torch, safetensors.torch
from pathlib import Path
from library.errors import UserError
from library.files.atomic import atomic_directory
from library.files.safetensors_io import save_pickle, save_tensors

def folder(write):
    with atomic_directory(target) as inside:
        write(inside)

target, tensors = Path({str(target)!r}), {{"a": torch.zeros(9000)}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for writing in (
    lambda: save_tensors(target, tensors),
    lambda: save_pickle(target, tensors),
    lambda: save_pickle(target, {{"a": torch.zeros(9)}}),
    lambda: folder(lambda inside: torch.save(tensors, inside / "x.bin")),
    lambda: folder(lambda inside: (inside / "x.txt").write_text("x" * 9000)),
):
    try:
        writing()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("a.safetensors: larger than a file may be here") == 5, done.stdout
    assert only(tmp_path) == []


def test_a_replacement_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    folder, new, old = tmp_path / "state", tmp_path / ".state.tmp", tmp_path / ".state.old.tmp"
    make(tmp_path / "one").rename(old)
    make(tmp_path / "other", b"newer").rename(new)
    recover_directory(folder)
    assert (folder / "model.bin").read_bytes() == b"newer"
    folder.rename(new)
    (new / "model.bin").write_bytes(b"torn")
    recover_directory(folder)  # the new one is not whole, so the old one comes back
    assert (folder / "model.bin").read_bytes() == b"weights"
    make(folder, b"newest")
    assert only(tmp_path) == ["state"]


def test_a_removed_folder_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "state")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *a, **k: None)  # as if killed there
        remove_tree(folder)
    recover_directory(folder)
    assert not folder.exists()


def test_a_folder_that_a_full_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match="sample: the disk is full"):
        make_folder(tmp_path / "sample")


def test_whatever_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "x", tmp_path / "none" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=r": cannot be written \("):
            write_bytes(path, b"1")
