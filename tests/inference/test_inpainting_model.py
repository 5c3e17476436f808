"""Inpainting models: the same latents as diffusers' pipeline gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.architectures.common.checkpoint import accepting_inpainting
from library.config.image_settings import ImageSettings
from library.inference.features.image_to_image import ImageToImage
from library.inference.features.inpainting_model import InpaintingModel
from library.inference.generate import generate_latents
from library.inference.models import GenerateOptions
from tests.fixtures.tiny_sd import MadeCheckpoint, Sizes, make_tiny_sd
from tests.inference.conftest import load_models


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    folder = tmp_path_factory.mktemp("inpainting") / "model"
    return make_tiny_sd(folder, layout="diffusers", sizes=Sizes(in_channels=9))


def test_the_same_as_diffusers_pipeline(
    inpainting: MadeCheckpoint,
    options: GenerateOptions,
    settings: ImageSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    # what is drawn within the VAE is keyed in another way, so both take its mean
    kept = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(kept, lambda self, generator=None: self.mean)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with accepting_inpainting():
        models = load_models(inpainting)
    monkeypatch.setattr(
        "library.inference.features.inpainting_model.encode_sources",
        lambda models, pixels, seeds, device: (
            models.vae.encode(pixels).latent_dist.mean * models.vae.config.scaling_factor
        ),
    )
    parts = StableDiffusionPipeline.from_pretrained(inpainting.path, safety_checker=None, requires_safety_checker=False)
    pipeline = StableDiffusionInpaintPipeline(**parts.components, requires_safety_checker=False)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(settings.seed))
    expected = pipeline(
        settings.prompt,
        image=Image.open(tmp_path / "image.png"),
        mask_image=Image.open(tmp_path / "mask.png"),
        negative_prompt=settings.negative_prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.scale,
        strength=1.0,
        latents=noise,
        height=64,
        width=64,
        output_type="latent",
    ).images
    one = replace(
        settings, image=tmp_path / "image.png", mask=tmp_path / "mask.png", strength=1.0, own={"input_channels": 9}
    )
    found = generate_latents(models, [one], options, features=[ImageToImage(), InpaintingModel()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    whole = generate_latents(
        models, [replace(settings, own={"input_channels": 9})], options, features=[InpaintingModel()]
    )
    assert torch.isfinite(whole).all() and (whole - found).abs().max() > 1e-3
