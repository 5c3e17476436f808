"""CLIP vision conditioning: what CLIP sees in the image to start from takes the place of the prompt's pooled text.

Shape legend: B images, P features of the pooled output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.denoise import Feature, Generation
from library.inference.feature_options.image_guidance import DECLARATION
from library.inference.models import ImageModels
from library.inference.seeing_models import clip_pixels, load_clip_vision
from library.inference.sources import read_pixels

STRENGTH = "clip_vision_strength"
#: tensor of the conditioning that it replaces, (B, P)
POOLED = "pool2"


class ClipVision(Feature):
    """Replace the pooled text of the prompts, but not of the negative prompts."""

    order = -5  # before the guidance adds the negative prompts
    declaration = DECLARATION

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether there is an image and a strength."""
        return settings.image is not None and settings.own.get(STRENGTH) is not None

    @classmethod
    def given(cls, options: Any) -> Mapping[str, Any]:
        strength = options.image_guidance.clip_vision_strength
        return {} if strength is None else {STRENGTH: strength}

    @classmethod
    def check(cls, options: Any, architecture: Architecture, checkpoint: Any) -> None:
        if options.image_guidance.clip_vision_strength is not None and POOLED not in architecture.text.arrays:
            raise UserError(f"--{STRENGTH}: this model has no pooled text to replace; it is for SDXL")

    @classmethod
    def load(
        cls, options: Any, models: ImageModels, checkpoint: Any, dtype: torch.dtype, device: torch.device
    ) -> Any | None:
        return None if options.image_guidance.clip_vision_strength is None else load_clip_vision(device)

    def prepare(self, generation: Generation) -> None:
        model, first = generation.models.of_features[ClipVision], generation.first
        size = (first.width, first.height)
        images = [(read_pixels(s.image, size) + 1) / 2 for s in generation.settings if s.image is not None]
        pixels = clip_pixels(torch.stack(images).to(generation.noise), model.config.image_size)
        seen = model(pixel_values=pixels).image_embeds * float(first.own[STRENGTH])
        pooled = generation.conditioning[POOLED]
        if seen.shape[1] != pooled.shape[1]:
            raise UserError(f"--{STRENGTH}: CLIP gives {seen.shape[1]} numbers, and the model reads {pooled.shape[1]}")
        tensors = {**generation.conditioning.tensors, POOLED: seen.to(pooled)}
        generation.conditioning = Conditioning(tensors)
