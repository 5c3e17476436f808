"""Tensor files: headers, damage, streaming, safe pickles."""

from __future__ import annotations

import json
import os
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.files.safetensors_io import (
    TensorInfo,
    is_pickle,
    iterate_tensors,
    load_pickle,
    load_tensors,
    read_header,
    save_pickle,
    save_tensors,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(2, dtype=torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
}


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"ss_v2": "False"})
    return tmp_path / "x.safetensors"


def test_header(saved: Path) -> None:
    header = read_header(saved)
    assert header.metadata == {"ss_v2": "False"}
    assert header.tensors == {
        "a": TensorInfo("F32", (2, 3)),
        "b": TensorInfo("BF16", (2,)),
        "c": TensorInfo("I64", ()),
    }


def test_round_trip_and_cast(saved: Path) -> None:
    loaded = load_tensors(saved)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in TENSORS.items())
    cast = load_tensors(saved, dtype=torch.float16)
    assert (cast["a"].dtype, cast["c"].dtype) == (torch.float16, torch.int64)
    assert [name for name, _ in iterate_tensors(saved, ["b"])] == ["b"]


def test_views_and_shared_storage_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors(tmp_path / "x.safetensors", {"t": base.T, "row": base[1], "same": base, "again": base})
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert (
        torch.equal(loaded["t"], base.T) and torch.equal(loaded["row"], base[1]) and torch.equal(loaded["again"], base)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>no</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs"),
        (b"PK\x03\x04" + b"\0" * 50, "pickled checkpoint"),
        (struct.pack("<Q", 5) + b"nojsn", "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as found:
        read_header(path)
    assert str(path) in str(found.value)


def test_a_cut_file_and_missing_ones(saved: Path, tmp_path: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-3])
    with pytest.raises(UserError, match="cut short"):
        load_tensors(saved)
    with pytest.raises(UserError, match="no such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="folder"):
        read_header(tmp_path)


def write_file(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(("begin", "words"), [(4, "a and b overlap"), (12, "a and b have 4 bytes between them")])
def test_tensors_share_no_bytes_and_leave_none_out(tmp_path: Path, begin: int, words: str) -> None:
    entry = {"dtype": "F32", "shape": [2]}
    header = {"a": {**entry, "data_offsets": [0, 8]}, "b": {**entry, "data_offsets": [begin, begin + 8]}}
    path = write_file(tmp_path / "x.safetensors", header, b"\0" * 20)
    with pytest.raises(UserError, match=f"damaged: {words}"):
        read_header(path)


def test_a_header_nested_too_deeply(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_header(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX's")
def test_what_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (read_header, is_pickle, load_pickle, load_tensors):
        for path in (tmp_path / "pipe.safetensors", Path("/dev/zero")):
            with pytest.raises(UserError, match="a pipe, socket or device, not a file"):
                read(path)


def test_the_header_alone_is_read(tmp_path: Path) -> None:
    """A file of 4 GB (sparse) is recognised at once."""
    path = tmp_path / "big.safetensors"
    size = 4_000_000_000
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    assert read_header(path).tensors["w"].shape == (size,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": TENSORS, "step": 3}, path, _use_new_zipfile_serialization=zipped)
    loaded = load_pickle(path)
    assert loaded.keys() == TENSORS.keys() and torch.equal(loaded["a"], TENSORS["a"])
    save_pickle(path, TENSORS)
    assert torch.equal(load_pickle(path)["b"], TENSORS["b"])


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/should_not_exist_suite_test",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": Evil()}}, path)
    with pytest.raises(UserError, match=r"system\), which could run code"):
        load_pickle(path)
    assert not Path("/tmp/should_not_exist_suite_test").exists()


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save_pickle(path, TENSORS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"x\.ckpt"):
        load_pickle(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"):
        load_pickle(path)


def test_the_content_tells_a_pickle(saved: Path, tmp_path: Path) -> None:
    """Files are renamed: neither kind is taken for the other."""
    renamed = saved.rename(tmp_path / "x.ckpt")
    assert not is_pickle(renamed) and read_header(renamed).tensors
    for zipped in (True, False):
        pickled = tmp_path / "y.safetensors"
        torch.save(TENSORS, pickled, _use_new_zipfile_serialization=zipped)
        assert is_pickle(pickled) and load_pickle(pickled).keys() == TENSORS.keys()
    (tmp_path / "z.pt").write_bytes(b"?")
    assert is_pickle(tmp_path / "z.pt") and not is_pickle(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
    ],
    ids=["a list", "no offsets", "backwards", "too large", "no shape"],
)
def test_a_damaged_header(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"1234")
    with pytest.raises(UserError, match="header is damaged"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "it is empty"), (b"<!DOCTYPE html><html>no</html>", "web page"), (b"\x89PNG\r\n", "an image")],
)
def test_what_is_no_pickle(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_pickle(path)


def test_a_header_that_is_cut_is_no_pickle(saved: Path) -> None:
    """Its length may begin with the byte that pickles begin with."""
    saved.write_bytes(struct.pack("<Q", 0x180) + b'{"a": ')
    with pytest.raises(UserError, match="cut short"):
        read_header(saved)


def test_what_lightning_left_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first published checkpoints hold callbacks and NumPy's numbers."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})  # type: ignore[attr-defined]
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    content = {
        "state_dict": TENSORS,
        "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5), "seen": np.zeros(3)}},
        "object": module.ModelCheckpoint(),
    }
    torch.save(content, tmp_path / "x.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(sys.modules, part)
    loaded = load_pickle(tmp_path / "x.ckpt")
    assert loaded.keys() == TENSORS.keys() and torch.equal(loaded["a"], TENSORS["a"])
