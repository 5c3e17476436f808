"""Tiny models of FLUX.1 and Chroma, and short runs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures.runs import (
    lora_arguments,
    make_images,
    train_here,
    write_dataset,
)
from tests.fixtures.tiny_flux import MadeFlux, make_tiny_flux

Train = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> MadeFlux:
    return make_tiny_flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> MadeFlux:
    return make_tiny_flux(tmp_path_factory.mktemp("schnell"), model="schnell")


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> MadeFlux:
    return make_tiny_flux(tmp_path_factory.mktemp("chroma"), model="chroma")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", ((64, 64), (100, 44), (64, 66)))


@pytest.fixture
def train(tmp_path: Path, folder: Path, dev: MadeFlux) -> Train:
    """A run of three steps in this process; returns the weights it saves as ``<name>/tiny.safetensors``."""

    def run(
        name: str, *, model: MadeFlux = dev, dataset: str = "", subset: str = "", **more: object
    ) -> dict[str, Tensor]:
        data = write_dataset(tmp_path / f"{name}.toml", folder, dataset=f"batch_size = 2\n{dataset}", subset=subset)
        settings = {"network_module": "networks.lora_flux", "max_train_steps": 3, **more}
        train_here(*lora_arguments(model, data, tmp_path / name, **settings), script="flux_train_network")
        return load_file(tmp_path / name / "tiny.safetensors")

    return run
