"""A folder of images and the run's data made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from library.architectures.formats import LatentFormat
from library.config.arguments import DatasetOptions
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.latent_cache import Peers
from library.training import text_caching
from tests.data.samples import SD, SIZES, dataset_file, draw


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", SIZES)


@pytest.fixture
def make_data(tmp_path: Path, folder: Path) -> Callable[..., TrainingData]:
    def make(
        *,
        dataset: str = "",
        subset: str = "",
        more: str = "",
        seed: int = 1,
        latent: LatentFormat = SD,
        **options: object,
    ) -> TrainingData:
        path = dataset_file(tmp_path / "data.toml", folder, dataset=dataset, subset=subset, more=more)
        config = load_dataset_config(path, DatasetOptions(**options))
        return TrainingData(config, seed=seed, latent=latent, prior_loss_weight=0.5)

    return make


@pytest.fixture
def peers_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own exchange knows of real processes only."""
    monkeypatch.setattr(
        text_caching, "peers_of", lambda a: Peers(a.process_index, a.num_processes, lambda items: a.gather_items(items))
    )
