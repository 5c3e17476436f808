"""Repaint the white parts of a mask and keep the black parts, with models that were not made for inpainting.

Lugmayr et al. 2022, "RePaint" (arXiv:2201.09865), eq. 8: after each step, the kept part is set to the source, noised to
the level of the next step. Grey blends both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.config.image_settings import ImageSettings
from library.inference.denoise import CHANNELS, Feature, Generation, StepInfo
from library.inference.features.image_to_image import SOURCE
from library.inference.sources import read_mask


class Inpainting(Feature):
    """Set the latents under the black parts of the masks to those of the sources; after ``ImageToImage``."""

    order = 30

    def __init__(self) -> None:
        self._generation: Generation | None = None
        self._repainted: Tensor | None = None  # (B, 1, h, w) in [0, 1]

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether there is a mask of the image to start from, and the model does not read it itself."""
        return settings.image is not None and settings.mask is not None and CHANNELS not in settings.own

    def prepare(self, generation: Generation) -> None:
        self._generation = generation
        size = (generation.noise.shape[-1], generation.noise.shape[-2])  # (w, h)
        masks = [read_mask(settings.mask, size) for settings in generation.settings if settings.mask is not None]
        self._repainted = torch.stack(masks).unsqueeze(1).to(generation.noise)

    def after_step(self, latents: Tensor, step: StepInfo) -> Tensor:
        generation, repainted = self._generation, self._repainted
        assert generation is not None and repainted is not None
        kept = generation.facts[SOURCE]
        if step.following is not None:
            level = step.following.expand(len(kept))
            kept = generation.scheduler.add_noise(kept, generation.noise, level)
        return repainted * latents + (1.0 - repainted) * kept
