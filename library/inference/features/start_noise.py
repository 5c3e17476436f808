"""Other noise to start from, for models that were trained with it: pyramid noise, or an offset.

Pyramid noise: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training": noise of smaller and smaller sizes
is enlarged and added. An offset is one number for the whole image.

Shape legend: C latent channels, (h, w) latent size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from library.config.image_settings import ImageSettings
from library.inference.denoise import Feature, Generation
from library.randomness import python_rng, torch_generator

_LEVELS = 6


class StartNoise(Feature):
    """Change the noise of each image with a probability, by numbers that its seed keys."""

    order = 15  # before a source is noised

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether one of the probabilities is given."""
        return bool(settings.own.get("pyramid_noise_prob") or settings.own.get("noise_offset_prob"))

    @classmethod
    def given(cls, options: Any) -> Mapping[str, Any]:
        image, found = options.image, {}
        if image.pyramid_noise_prob:
            found["pyramid_noise_prob"] = image.pyramid_noise_prob
            found["pyramid_noise_discount_range"] = tuple(image.pyramid_noise_discount_range or (0.4, 0.4))
        if image.noise_offset_prob:
            found["noise_offset_prob"] = image.noise_offset_prob
            found["noise_offset_range"] = tuple(image.noise_offset_range or (0.0, 0.0))
        return found

    def prepare(self, generation: Generation) -> None:
        found = [
            _changed(noise, settings) for noise, settings in zip(generation.noise, generation.settings, strict=True)
        ]
        generation.noise = torch.stack(found)
        generation.latents = generation.noise * generation.scheduler.init_noise_sigma


def _changed(noise: Tensor, settings: ImageSettings) -> Tensor:
    own, rng = settings.own, python_rng(settings.seed, "start noise")
    generator = torch_generator(settings.seed, "start noise")
    if rng.random() < own.get("pyramid_noise_prob", 0.0):
        noise = pyramid_noise(noise, rng.uniform(*own["pyramid_noise_discount_range"]), rng, generator)
    if rng.random() < own.get("noise_offset_prob", 0.0):
        noise = noise + rng.uniform(*own["noise_offset_range"])
    return noise


def pyramid_noise(noise: Tensor, discount: float, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Return noise (C, h, w) with noise of smaller sizes in it, of standard deviation 1."""
    channels, height, width = noise.shape
    for level in range(_LEVELS):
        shrink = (rng.random() * 2 + 2) ** level
        size = max(int(height / shrink), 1), max(int(width / shrink), 1)
        small = torch.randn((1, channels, *size), generator=generator).to(noise)
        noise = noise + functional.interpolate(small, (height, width), mode="bilinear")[0] * discount**level
        if size == (1, 1):
            break
    return noise / noise.std()
