"""Classifier-free guidance: away from a negative prompt, towards the prompt.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv:2207.12598), eq. 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.architectures.base import Conditioning
from library.inference.denoise import Denoise, Feature, Generation, StepInfo


class Guidance(Feature):
    """Predict with and without the prompt in one pass, and go on from the difference; nothing at a scale of 1."""

    def __init__(self) -> None:
        self._scale = 1.0

    def prepare(self, generation: Generation) -> None:
        self._scale = generation.first.scale
        if self._scale == 1.0:
            return
        negative = generation.encode([settings.negative_prompt for settings in generation.settings])
        generation.conditioning = Conditioning.cat([negative, generation.conditioning])

    def wrap(self, denoise: Denoise) -> Denoise:
        if self._scale == 1.0:
            return denoise

        def guided(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            # (B, C, h, w) -> (2B, C, h, w)
            prediction = denoise(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), step)
            without, with_prompt = prediction.chunk(2)
            return without + self._scale * (with_prompt - without)

        return guided
