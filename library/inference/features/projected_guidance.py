"""Classifier-free guidance in the first steps, then adaptive projected guidance, which does not oversaturate.

Sadat, Hilliges & Weber 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models"
(arXiv:2410.02416), algorithm 1, with the constants of HunyuanImage 2.1 (Tencent 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.architectures.conditioning import Conditioning
from library.inference.denoise import Denoise, Feature, Generation, StepInfo

#: of the running difference between both predictions; below 0 it pushes away from where guidance went before
MOMENTUM = -0.5
#: the largest norm of that difference
LARGEST = 10.0
#: scale of what of it is orthogonal to the prediction with the prompt
SCALE = 10.0


class ProjectedGuidance(Feature):
    """Predict with and without the prompt, one after the other; no effect at a scale of 1.

    ``Architecture.guidance_settings`` of an image gives ``start``, the last step of plain guidance, counted from 0, and
    ``rescale`` and ``rescale_projected``: how far a guided prediction gets the deviation of that with the prompt, in
    the steps of either kind.
    """

    def __init__(self) -> None:
        self._scale = 1.0
        self._generation: Generation | None = None
        self._pair: tuple[Conditioning, Conditioning] | None = None
        self._starts: list[int] = []
        self._rescale, self._rescale_projected = 0.0, 0.0
        self._running: Tensor | None = None

    def prepare(self, generation: Generation) -> None:
        self._scale = generation.first.scale
        if self._scale == 1.0:
            return
        found = [generation.models.architecture.guidance_settings(settings) for settings in generation.settings]
        self._starts = [int(one["start"]) for one in found]
        self._rescale, self._rescale_projected = found[0]["rescale"], found[0]["rescale_projected"]
        negative = generation.encode([settings.negative_prompt for settings in generation.settings], True)
        self._generation, self._pair = generation, (negative, generation.conditioning)

    def wrap(self, denoise: Denoise) -> Denoise:
        generation, pair = self._generation, self._pair
        if generation is None or pair is None:
            return denoise

        def guided(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            predictions = []
            for conditioning in pair:
                generation.conditioning = conditioning
                predictions.append(denoise(noisy, timesteps, step))
            without, with_prompt = predictions  # (B, C, h, w) each
            difference = with_prompt - without
            self._running = difference if self._running is None else difference + MOMENTUM * self._running
            projected = [step.index > start for start in self._starts]
            rows = [
                self._projected(without, with_prompt, row) if late else self._plain(without, with_prompt, row)
                for row, late in enumerate(projected)
            ]
            return torch.cat(rows)

        return guided

    def _plain(self, without: Tensor, with_prompt: Tensor, row: int) -> Tensor:
        """Return the prediction (1, C, h, w) of one image."""
        base, wanted = without[row : row + 1], with_prompt[row : row + 1]
        return rescaled(base + self._scale * (wanted - base), wanted, self._rescale)

    def _projected(self, without: Tensor, with_prompt: Tensor, row: int) -> Tensor:
        assert self._running is not None
        base, wanted, running = (x[row : row + 1] for x in (without, with_prompt, self._running))
        clipped = running * (LARGEST / running.norm()).clamp(max=1.0)
        return rescaled(base + SCALE * orthogonal(clipped, wanted), wanted, self._rescale_projected)


def orthogonal(x: Tensor, to: Tensor) -> Tensor:
    """Return the part of x (1, C, h, w) that is orthogonal to another prediction; computed in float64."""
    double = torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64
    direction = to.to(double) / to.to(double).norm().clamp(min=1e-12)
    exact = x.to(double)
    return (exact - (exact * direction).sum() * direction).to(x.dtype)


def rescaled(guided: Tensor, with_prompt: Tensor, share: float) -> Tensor:
    """Return a prediction (1, C, h, w) with a share of the way to the deviation of that with the prompt.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891), equations 15 and
    16.
    """
    if not share:
        return guided
    return share * guided * (with_prompt.std() / guided.std()) + (1 - share) * guided
