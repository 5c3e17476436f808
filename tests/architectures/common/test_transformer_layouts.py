"""Transformers are found in all forms of their files."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.families import FAMILIES


@pytest.mark.parametrize("family", ["sd3", "lumina", "hunyuan_image"])
def test_shards_of_the_published_layout_are_one_transformer(tmp_path: Path, family: str) -> None:
    (tmp_path / "whole").mkdir()
    path = FAMILIES[family].make(tmp_path / "whole").path
    weights = load_file(path)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (1, 2):
        half = dict(list(weights.items())[number - 1 :: 2])
        save_file(half, folder / f"model-{number:05d}-of-00002.safetensors")
    layouts = import_module(f"library.architectures.{family}.names").LAYOUTS
    infer_sizes = import_module(f"library.architectures.{family}.sizes").infer_sizes
    expected = layouts.source(path, infer_sizes)
    assert expected.file_names()
    for place in (folder, folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"):
        found = layouts.source(place, infer_sizes)
        assert found.config == expected.config and set(found.file_names()) == set(expected.file_names())
        for name, tensor in found.file.read(found.file_names()):
            assert torch.equal(tensor, weights[name]), name
