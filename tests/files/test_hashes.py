"""Hashes by their published definitions, worked again by hand."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.files import hashes


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_CACHE_DIR", str(tmp_path / "cache"))


def test_short_hash(tmp_path: Path) -> None:
    data = os.urandom(0x120000)
    (tmp_path / "m").write_bytes(data)
    assert hashes.model_hash(tmp_path / "m") == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert hashes.model_hash(tmp_path / "none") == "NOFILE"
    assert hashes.model_hash(tmp_path) == "IsADirectory"


def test_background_hash_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m"
    file.write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert hashes.HashInBackground(file).result() == expected

    def never(path: object) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(hashes, "sha256_file", never)
    assert hashes.HashInBackground(file).result() == expected


def test_a_changed_file_is_hashed_anew(tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_bytes(b"abc")
    hashes.HashInBackground(file).result()
    file.write_bytes(b"abcd")
    assert hashes.HashInBackground(file).result() == hashlib.sha256(b"abcd").hexdigest()


def test_an_unwritable_or_damaged_memory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m"
    file.write_bytes(b"abc")
    (tmp_path / "plain file").write_text("")
    monkeypatch.setenv("SUITE_CACHE_DIR", str(tmp_path / "plain file" / "below"))
    assert hashes.HashInBackground(file).result() == hashlib.sha256(b"abc").hexdigest()
    assert hashes.HashInBackground(tmp_path / "gone").result() == "NOFILE"


def test_sshs_hashes_are_of_the_bytes_after_the_header(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(700, 900), "a": torch.ones(3)}
    metadata = {"ss_steps": "3", "modelspec.title": "t"}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_steps": "3"})
    data = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    model, legacy = hashes.sshs_hashes(tensors, metadata)
    assert model == hashlib.sha256(data[start:]).hexdigest()
    assert legacy == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    other, _ = hashes.sshs_hashes(tensors, {**metadata, "modelspec.title": "other"})
    assert other == model
