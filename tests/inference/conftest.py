"""A tiny random model, loaded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.architectures.sd import SD
from library.config.image_settings import ImageSettings
from library.inference.models import GenerateOptions, ImageModels
from tests.fixtures.tiny_sd import MadeCheckpoint, make_tiny_sd


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    """A Diffusers folder, which diffusers itself can load, too."""
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "model", layout="diffusers")


def load_models(made: MadeCheckpoint, dtype: torch.dtype = torch.float32, **flags: bool) -> ImageModels:
    flags = {"v2": False, "v_parameterization": False, **flags}
    checkpoint = SD.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir), **flags)
    return ImageModels(
        architecture=SD,
        tokenizers=SD.load_tokenizers(checkpoint),
        text_encoders=SD.load_text_encoders(checkpoint, dtype=dtype, device="cpu"),
        denoiser=SD.load_denoiser(checkpoint, dtype=dtype, device="cpu"),
        vae=SD.load_vae(checkpoint, dtype=dtype, device="cpu"),
        v_prediction=checkpoint.info.v_prediction,
    )


@pytest.fixture
def models(folder: MadeCheckpoint) -> ImageModels:
    return load_models(folder)


@pytest.fixture
def options() -> GenerateOptions:
    return GenerateOptions(device=torch.device("cpu"))


@pytest.fixture
def settings() -> ImageSettings:
    return ImageSettings("a photo of the cat", "dog", 64, 64, steps=3, scale=5.0, sampler="ddim", seed=7)


@pytest.fixture
def hint(tmp_path: Path) -> Path:
    """An image for ControlNets to read."""
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "hint.png")
    return tmp_path / "hint.png"
