"""Fixtures of the tests of whole models: a tiny checkpoint for each script, and a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fixtures.runs import write_dataset
from tests.fixtures.whole import SCRIPTS, Whole, make_whole


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Runs are compared bit for bit."""
    torch.set_num_threads(1)


#: their runs take longest
_SLOW = ("sdxl_train", "flux_train-chroma", "sd3_train", "lumina_train", "hunyuan_image_train")


@pytest.fixture(
    scope="session", params=[pytest.param(n, marks=[pytest.mark.slow] if n in _SLOW else []) for n in SCRIPTS]
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Every script."""
    return make_whole(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("fine_tune", tmp_path_factory.mktemp("fine_tune"))


@pytest.fixture(scope="session")
def train_db(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("train_db", tmp_path_factory.mktemp("train_db"))


@pytest.fixture(scope="session")
def sdxl_train(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("sdxl_train", tmp_path_factory.mktemp("sdxl_train"))


@pytest.fixture(scope="session")
def flux_train(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("flux_train", tmp_path_factory.mktemp("flux_train"))


@pytest.fixture(scope="session")
def sd3_train(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("sd3_train", tmp_path_factory.mktemp("sd3_train"))


@pytest.fixture(scope="session")
def lumina_train(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("lumina_train", tmp_path_factory.mktemp("lumina_train"))


@pytest.fixture(scope="session")
def hunyuan_image_train(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return make_whole("hunyuan_image_train", tmp_path_factory.mktemp("hunyuan_image_train"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "data.toml", images, dataset="batch_size = 2")
