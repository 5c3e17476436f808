"""Images are generated at the size that the model was trained at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.inference.native_size import native_size
from tests.fixtures.runs import ROOT


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [({"modelspec.resolution": "64x96"}, (64, 96)), ({"modelspec.resolution": "large"}, (512, 768)), ({}, (512, 768))],
)
def test_of_a_file(tmp_path: Path, metadata: dict[str, str], expected: tuple[int, int]) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata)
    assert native_size(tmp_path / "model.safetensors", "512x768") == expected


@pytest.mark.parametrize(("cells", "expected"), [(8, (64, 64)), (96, (768, 768)), (None, (512, 512))])
def test_of_a_folder(tmp_path: Path, cells: int | None, expected: tuple[int, int]) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"sample_size": cells} if cells else {}))
    assert native_size(tmp_path, "512x512") == expected


def test_of_the_quickstarts_model() -> None:
    assert native_size(ROOT / "examples/quickstart/model", "512x512") == (64, 64)


def test_of_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert native_size(tmp_path / "model.ckpt", "1024x1024") == (1024, 1024)
