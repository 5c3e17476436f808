"""Classifier-free guidance: away from a negative prompt, towards the prompt.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv:2207.12598), eq. 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.architectures.conditioning import Conditioning
from library.inference.denoise import Denoise, Feature, Generation, StepInfo


class Guidance(Feature):
    """Predict with and without the prompt in one pass, and extrapolate; no effect at a scale of 1.

    With a separate scale for the negative prompt there are three predictions: from that of the empty prompt towards the
    prompt, and away from the negative one.
    """

    order = 0  # around all that changes the prediction itself

    def __init__(self) -> None:
        self._scale = 1.0
        self._negative_scale: float | None = None

    def prepare(self, generation: Generation) -> None:
        self._scale = generation.first.scale
        if self._scale == 1.0:
            return
        self._negative_scale = generation.first.negative_scale
        negative = generation.encode([settings.negative_prompt for settings in generation.settings], True)
        parts = [negative, generation.conditioning]
        if self._negative_scale is not None:
            parts.append(generation.encode([""] * len(generation.settings), False))
        generation.conditioning = Conditioning.cat(parts)

    def wrap(self, denoise: Denoise) -> Denoise:
        if self._scale == 1.0:
            return denoise

        rows = 2 if self._negative_scale is None else 3

        def guided(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            # (B, C, h, w) -> (2B or 3B, C, h, w)
            prediction = denoise(torch.cat([noisy] * rows), torch.cat([timesteps] * rows), step)
            if self._negative_scale is None:
                without, with_prompt = prediction.chunk(2)
                return without + self._scale * (with_prompt - without)
            negative, with_prompt, empty = prediction.chunk(3)
            return empty + self._scale * (with_prompt - empty) - self._negative_scale * (negative - empty)

        return guided
