"""The quickstart's output folder: an earlier run's files are replaced, nobody else's are touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from quickstart import prepare, record


def made(folder: Path) -> Path:
    """An output folder after a run."""
    prepare(folder)
    (folder / "before").mkdir()
    (folder / "before" / "0.png").write_bytes(b"image")
    (folder / "quickstart_lora.safetensors").write_bytes(b"weights")
    record(folder)
    return folder


def test_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    output = made(tmp_path / "a" / "out")
    prepare(output)
    assert list(output.iterdir()) == []
    prepare(output)  # an empty folder is as good as a new one


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds what this script did not make.*--output"):
        prepare(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(SystemExit, match="did not make"):
        prepare(tmp_path / "mine.txt")

    output = made(tmp_path / "out")
    (output / "before" / "mine.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="did not make"):
        prepare(output)
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["mine.png"]


def test_the_list_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("mine")
    output = made(tmp_path / "out")
    with (output / ".made_by_quickstart").open("a", encoding="utf-8") as listed:
        listed.write(f"../other.txt\n{other}\n")
    prepare(output)
    assert other.read_text() == "mine"
