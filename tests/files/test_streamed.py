"""Safetensors files written tensor by tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.files.precisions import SAVED, cast, parse_precision
from library.files.safetensors_io import TensorReader, read_header
from library.files.streamed import check_target, data_bytes, tensor_info, write_streamed

TENSORS = {
    "half": torch.arange(3, dtype=torch.bfloat16),
    "eight": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
    "count": torch.tensor(7, dtype=torch.int64),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
}
INFOS = {name: tensor_info(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_others_read_what_is_written(tmp_path: Path) -> None:
    path, steps = tmp_path / "x.safetensors", []
    progress = lambda done, total: steps.append((done, total))  # noqa: E731
    write_streamed(path, INFOS, TENSORS.__getitem__, {"a": "b"}, progress=progress)
    assert steps == [(n, 6) for n in range(1, 7)]
    header, loaded = read_header(path), load_file(path)
    assert header.metadata == {"a": "b"} and loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
        # aligned, so that a mapped file is read without copies
        assert header.tensors[name].offset % max(1, tensor.element_size()) == 0
    with TensorReader(path) as reader:
        assert torch.equal(reader.read("turned"), TENSORS["turned"])
    assert sum(map(data_bytes, INFOS.values())) == 6 + 2 + 8 + 24 + 2


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fails(name: str) -> torch.Tensor:
        if name == "half":
            raise UserError("the source is torn")
        return TENSORS[name]

    with pytest.raises(UserError, match="torn"):
        write_streamed(path, INFOS, fails)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_target_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "x.ckpt", "must end with .safetensors"),
        (tmp_path / "none" / "x.safetensors", "does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            check_target(path, "--save_to")
    free = shutil.disk_usage(tmp_path).free
    check_target(tmp_path / "x.safetensors", "--save_to", needed=1000)
    with pytest.raises(UserError, match="GB are free"):
        check_target(tmp_path / "x.safetensors", "--save_to", needed=10 * free)


def test_casting() -> None:
    numbers = torch.tensor([1e6, -1e6, 0.5])
    assert cast(numbers, torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 0.5]
    assert cast(numbers.to(torch.float8_e5m2), torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 0.5]
    assert cast(torch.tensor([3]), torch.float16).dtype == torch.int64
    assert parse_precision("--save_precision", "fp8", SAVED) is torch.float8_e4m3fn
    with pytest.raises(UserError, match="--save_precision fp61: unknown"):
        parse_precision("--save_precision", "fp61", SAVED)
