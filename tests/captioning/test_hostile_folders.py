"""Folders as people have them, through every script that describes images: odd names, torn files, kills, full disks."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune import (
    make_captions,
    make_captions_by_git,
    make_captions_by_vlm,
    merge_captions_to_metadata,
    merge_dd_tags_to_metadata,
    tag_images_by_wd14_tagger,
)
from tests.fixtures.crashes import Ended, fork_run
from tests.fixtures.tiny_captioners import write_tiny_blip, write_tiny_git, write_tiny_llava, write_wd_onnx

pytestmark = pytest.mark.usefixtures("own_root_logger")

#: script, the maker of its model, and its options
SCRIPTS: dict[str, tuple[ModuleType, Callable[[Path], Path], str, tuple[str, ...]]] = {
    "blip": (make_captions, write_tiny_blip, "--caption_weights", ("--beam_search", "--max_length", "12")),
    "git": (make_captions_by_git, write_tiny_git, "--model_id", ("--max_length", "12")),
    "vlm": (make_captions_by_vlm, write_tiny_llava, "--model_id", ("--max_new_tokens", "4")),
    "tagger": (tag_images_by_wd14_tagger, write_wd_onnx, "--repo_id", ("--onnx", "--thresh", "0.1")),
}
#: two are as good as four for what all of them share
FAST = ("git", "tagger")
NAMES = ["a b.PNG", "日本語 {x}.png", "%d %s.jpg", "a.b.c.webp", "-v.png", "café.bmp", "grey.png", "turned.jpg"]


@pytest.fixture(scope="module", params=[n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def script(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Run one of the scripts on a folder."""
    module, make, flag, options = SCRIPTS[request.param]
    model = make(tmp_path_factory.mktemp(request.param) / "model")

    def run(folder: Path, *more: object) -> None:
        words = [folder, flag, model, *options, "--caption_extension", ".txt", "--batch_size", 3, *more]
        module.main(module.setup_parser().parse_args([str(word) for word in words]))

    return run


def huge_png(side: int) -> bytes:
    """A few bytes that claim to be an image of gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What can be read are NAMES; the others are torn, or no images."""
    place = tmp_path / "Bilder für [LoRA] (1)"
    place.mkdir()
    for index, name in enumerate(NAMES):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 20 + 20 * index, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        if name == "turned.jpg":
            exif[0x0112] = 6
        (image.convert("L") if name == "grey.png" else image).save(place / name, exif=exif)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (place / "torn.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (place / "empty.png").touch()
    (place / "page.png").write_text("<html>", encoding="utf-8")
    (place / "huge.png").write_bytes(huge_png(100_000))
    (place / "folder.png").mkdir()
    (place / "notes.md").write_text("no image", encoding="utf-8")
    (place / "café.jpg").write_bytes(whole.getvalue())  # of the same name as another
    return place


BAD = ("torn.jpg", "empty.png", "page.png", "huge.png")


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def test_what_can_be_read_is_described(
    folder: Path, script: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad images are named; a second run keeps all; nothing else is left in the folder."""
    before = {path.name for path in folder.iterdir()}
    script(folder, "--dry_run")
    assert {path.name for path in folder.iterdir()} == before
    script(folder)
    said = capsys.readouterr().err
    assert all(f"{name}: " in said for name in BAD), said
    assert "café.jpg and café.bmp share" in said or "café.bmp and café.jpg share" in said
    made = texts(folder)
    assert set(made) == {Path(name).stem + ".txt" for name in NAMES}
    assert all(text.strip() and text.endswith("\n") for text in made.values())
    assert {path.name for path in folder.iterdir()} == before | set(made)
    script(folder)
    said = capsys.readouterr().err
    assert f"{len(NAMES)} kept" in said and texts(folder) == made
    if sys.platform == "linux":
        other = folder / os.fsdecode(b"b\xfccher.png")  # of an archive in another encoding
        Image.new("RGB", (30, 30)).save(other)
        script(folder)
        assert other.with_suffix(".txt").exists()


def test_it_stops_at_a_bad_image(folder: Path, script: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script(folder, "--on_bad_image", "stop")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and any(name in lines[0] for name in BAD)


def forked(folder: Path, script: Callable[..., None], log: Path, **how: Any) -> Ended:
    return fork_run(lambda: script(folder, "--max_data_loader_n_workers", 0), log, watched=(folder,), **how)


def test_killed_full_and_read_only(folder: Path, tmp_path: Path, script: Callable[..., None]) -> None:
    """Texts are whole or not there, and the same command goes on; a full or read-only disk is one line."""
    whole = forked(folder, script, tmp_path / "whole.log")
    assert whole.code == 0, whole.text
    expected = texts(folder)
    for path in folder.glob("*.txt"):
        path.unlink()
    for what, words, at in (("full disk", "disk is full", len(whole.points) // 2), ("read only", "read-only", 2)):
        ended = forked(folder, script, tmp_path / f"{what}.log", at=at, what=what)
        lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
        assert ended.code == 2 and len(lines) == 1 and words in lines[0].lower(), ended.text
        assert "Traceback" not in ended.text
    made = texts(folder)
    assert 0 < len(made) < len(expected) and all(expected[name] == text for name, text in made.items())
    killed = forked(folder, script, tmp_path / "killed.log", at=len(whole.points) // 4)
    assert killed.code == -9
    assert all(expected[name] == text for name, text in texts(folder).items())
    assert forked(folder, script, tmp_path / "rest.log").code == 0
    assert texts(folder) == expected
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("field", ["caption", "tags"])
def test_merging_what_is_there(folder: Path, tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts in any line ends and with a mark of their encoding; images without a text and damaged texts are named."""
    module = merge_captions_to_metadata if field == "caption" else merge_dd_tags_to_metadata
    written = {
        "a b": b"\xef\xbb\xbfa cat,\r\n", "日本語 {x}": "赤い猫".encode(), "%d %s": b"50% {caf\xc3\xa9|b}\n", "a.b.c": b"",
        "torn": b"of a torn image",
    }  # fmt: skip
    for stem, data in written.items():
        (folder / f"{stem}.txt").write_bytes(data)
    (folder / "café.jpg").unlink()  # metadata without paths cannot tell it from café.bmp
    target = tmp_path / "all.json"
    words = [str(folder), str(target), "--caption_extension", ".txt"]
    module.main(module.setup_parser().parse_args(words))
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["a b"][field] == "a cat," and found["日本語 {x}"][field] == "赤い猫"
    assert found["%d %s"][field] == "50% {café|b}"
    said = capsys.readouterr().err
    assert "there is no -v.txt, café.txt, empty.txt and 4 more" in said
    (folder / "-v.txt").write_bytes(b"caf\xe9")
    before = target.read_bytes()
    with pytest.raises(SystemExit) as ended:
        module.main(module.setup_parser().parse_args(words))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "-v.txt" in lines[0] and "UTF-8" in lines[0]
    assert target.read_bytes() == before
