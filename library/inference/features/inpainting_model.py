"""Inpainting models, whose U-Net also reads the mask and the latents of the kept part.

Rombach et al. 2022 (arXiv:2112.10752), section 4.5. Without a mask all of the image is repainted.

Shape legend: B images, R rows of the model's batch, C latent channels, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from library.config.image_settings import ImageSettings
from library.inference.denoise import CHANNELS, Denoise, Feature, Generation, StepInfo
from library.inference.features.image_to_image import encode_sources
from library.inference.sources import read_mask, read_pixels


class InpaintingModel(Feature):
    """Put mask and kept part behind the noisy latents."""

    order = 70

    def __init__(self) -> None:
        self._beside = torch.empty(0)  # (B, 1 + C, h, w)

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether the model is one for inpainting."""
        return CHANNELS in settings.own

    def prepare(self, generation: Generation) -> None:
        first = generation.first
        size = (first.width, first.height)
        masks, kept = [], []
        for settings in generation.settings:
            mask = _mask(settings.mask, size)  # (1, H, W), 1 is repainted
            pixels = torch.zeros(3, *mask.shape[1:]) if settings.image is None else read_pixels(settings.image, size)
            masks.append(mask)
            kept.append(pixels * (mask < 0.5))
        seeds = [settings.seed for settings in generation.settings]
        latents = encode_sources(generation.models, torch.stack(kept), seeds, generation.options.device)
        mask = functional.interpolate(torch.stack(masks), generation.noise.shape[-2:], mode="nearest")
        self._beside = torch.cat([mask.to(generation.noise), latents.to(generation.noise)], dim=1)

    def wrap(self, denoise: Denoise) -> Denoise:
        def joined(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            beside = self._beside.repeat(len(noisy) // len(self._beside), 1, 1, 1)
            return denoise(torch.cat([noisy, beside], dim=1), timesteps, step)

        return joined


def _mask(path: Path | None, size: tuple[int, int]) -> Tensor:
    """Return the mask (1, H, W) of 0 and 1: what is lighter than grey is repainted."""
    if path is None:
        return torch.ones(1, size[1], size[0])
    return (read_mask(path, size) >= 0.5).float().unsqueeze(0)
