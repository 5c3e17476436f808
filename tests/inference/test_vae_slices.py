"""A VAE in strips gives the same images, and holds less at once."""

from __future__ import annotations

import pytest
import torch

from library.inference import vae_slices
from library.inference.models import ImageModels
from library.inference.vae_slices import slice_vae


@pytest.mark.parametrize("slices", [1, 3, 16])
@torch.inference_mode()
def test_strips_change_nothing(models: ImageModels, slices: int) -> None:
    latents, pixels = torch.randn(2, 4, 9, 12), torch.rand(1, 3, 72, 96) * 2 - 1
    decoded, encoded = models.vae.decode(latents).sample, models.vae.encode(pixels).latent_dist.mean
    slice_vae(models.vae, slices)
    torch.testing.assert_close(models.vae.decode(latents).sample, decoded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(models.vae.encode(pixels).latent_dist.mean, encoded, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_convolutions_read_strips_alone(models: ImageModels, monkeypatch: pytest.MonkeyPatch) -> None:
    slice_vae(models.vae, 8)
    heights: list[int] = []
    original = vae_slices._conv

    def seen(rows: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        heights.append(rows.shape[2])
        return original(rows, *args, **kwargs)

    monkeypatch.setattr(vae_slices, "_conv", seen)
    models.vae.decode(torch.randn(1, 4, 32, 8))
    assert max(heights) <= 256 // 8 + 2 and len(heights) > 20
