"""Classifier-free guidance in the first part of the way only, and no stronger than the prediction with the prompt.

Qin et al. 2025, "Lumina-Image 2.0" (arXiv:2503.21758), section 3.4, "CFG-Renorm" and "CFG-Trunc".
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.architectures.conditioning import Conditioning
from library.diffusion.flow import TIMESTEPS
from library.inference.denoise import Denoise, Feature, Generation, StepInfo


class NormedGuidance(Feature):
    """Predict with and without the prompt in one pass while the image is below ``cfg_trunc_ratio``; then with it alone.

    ``renorm_cfg`` times the norm of the prediction with the prompt is the largest norm that the guided one may have; 0
    for no limit. No effect at a scale of 1.
    """

    order = 0  # around all that changes the prediction itself

    def __init__(self) -> None:
        self._scale = 1.0
        self._part = 1.0
        self._limit = 0.0
        self._generation: Generation | None = None
        self._both: Conditioning | None = None
        self._alone: Conditioning | None = None

    def prepare(self, generation: Generation) -> None:
        first = generation.first
        self._scale = first.scale
        if self._scale == 1.0:
            return
        part = first.own.get("cfg_trunc_ratio")
        self._part = 1.0 if part is None else float(part)
        self._limit = float(first.own.get("renorm_cfg") or 0.0)
        negative = generation.encode([settings.negative_prompt for settings in generation.settings], True)
        self._generation, self._alone = generation, generation.conditioning
        self._both = generation.conditioning = Conditioning.cat([negative, generation.conditioning])

    def wrap(self, denoise: Denoise) -> Denoise:
        generation, both, alone = self._generation, self._both, self._alone
        if generation is None or both is None or alone is None:
            return denoise
        # the timesteps are known beforehand, so that no step waits for the device
        guided_steps = [1 - float(timestep) / TIMESTEPS < self._part for timestep in generation.timesteps.cpu()]

        def guided(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            if not guided_steps[step.index]:
                generation.conditioning = alone
                return denoise(noisy, timesteps, step)
            generation.conditioning = both
            prediction = denoise(torch.cat([noisy] * 2), torch.cat([timesteps] * 2), step)  # (2B, C, h, w)
            without, with_prompt = prediction.chunk(2)
            return limited(without + self._scale * (with_prompt - without), with_prompt, self._limit)

        return guided


def limited(guided: Tensor, with_prompt: Tensor, limit: float) -> Tensor:
    """Return guided predictions (B, C, h, w) with norms up to ``limit`` times those with the prompt; 0: unchanged."""
    if limit <= 0:
        return guided
    norms, most = (x.float().flatten(1).norm(dim=1) for x in (guided, with_prompt))  # (B,) each
    factors = (limit * most / norms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)
    return guided * factors.view(-1, 1, 1, 1).to(guided.dtype)
