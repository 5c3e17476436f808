"""Latents to noisy input and target, and predictions to losses: pure functions, the same for all families.

Shape legend: B batch, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion import loss as losses
from library.diffusion import noise as noises
from library.diffusion.objective import LossSettings, Objective, TimestepRange
from library.randomness import torch_generator


@dataclass(frozen=True)
class NoiseSettings:
    """The settings of adding noise; see ``library.diffusion.noise`` for each formula."""

    offset: float | None = None
    offset_random_strength: bool = False
    adaptive_scale: float | None = None
    multires_iterations: int | None = None
    multires_discount: float = 0.3
    ip_gamma: float | None = None
    ip_gamma_random_strength: bool = False
    min_timestep: int = 0
    max_timestep: int = 1000

    @property
    def timesteps(self) -> TimestepRange:
        return TimestepRange(self.min_timestep, self.max_timestep)


@dataclass(frozen=True)
class NoisyBatch:
    """The denoiser's input and target."""

    noisy: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,), as the objective draws them: int64, 0..999, or float32, 0..1000
    target: Tensor  # (B, C, h, w)


def _generators(visits: Sequence[int], purpose: str) -> list[torch.Generator]:
    return [torch_generator(visit, purpose) for visit in visits]


def make_noisy(
    latents: Tensor,
    visits: Sequence[int],
    objective: Objective,
    settings: NoiseSettings,
    *,
    level: int | None = None,
) -> NoisyBatch:
    """Add noise to scaled latents (B, C, h, w), each at a random timestep, or all at one; every draw is keyed by the
    visit.

    Args:
        level: one of the objective's fixed levels, for all samples.
    """
    device, size = latents.device, (latents.shape[-2], latents.shape[-1])
    noise = noises.draw_noise(tuple(latents.shape[1:]), _generators(visits, "noise")).to(device, non_blocking=True)
    # the offset first, so that it is scaled back with the rest; the published order
    if settings.offset:
        noise = noises.offset_noise(
            noise,
            latents,
            _generators(visits, "noise offset"),
            offset=settings.offset,
            random_strength=settings.offset_random_strength,
            adaptive_scale=settings.adaptive_scale,
        )
    if settings.multires_iterations:
        noise = noises.pyramid_noise(
            noise,
            _generators(visits, "multires noise"),
            iterations=settings.multires_iterations,
            discount=settings.multires_discount,
        )
    if level is None:
        timesteps = objective.draw(_generators(visits, "timestep"), settings.timesteps, size)
    else:
        timesteps = objective.at_level(level, len(visits), settings.timesteps, size)
    timesteps = timesteps.to(device, non_blocking=True)
    input_noise = noise
    if settings.ip_gamma:
        # only the input is perturbed: the target stays the clean noise (Ning et al. 2023, alg. 1)
        input_noise = noises.perturb_input(
            noise,
            _generators(visits, "ip noise"),
            gamma=settings.ip_gamma,
            random_strength=settings.ip_gamma_random_strength,
        )
    noisy = objective.noised(latents, input_noise, timesteps)
    return NoisyBatch(noisy, timesteps, objective.target(latents, noise, timesteps))


def sample_losses(
    prediction: Tensor,
    noisy: NoisyBatch,
    objective: Objective,
    settings: LossSettings,
    *,
    masks: Tensor | None = None,
) -> Tensor:
    """Return the weighted loss of each sample: predictions (B, C, h, w) -> (B,) float32.

    Args:
        masks: (B, H, W) weights of the images' pixels.
    """
    huber_c = None
    if settings.loss_type in ("huber", "smooth_l1"):
        huber_c = objective.huber_threshold(noisy.timesteps, settings)
    found = objective.comparable(prediction.float(), noisy.timesteps)
    loss = losses.conditional_loss(found, noisy.target.float(), settings.loss_type, huber_c=huber_c)
    loss = losses.masked(loss, masks).mean(dim=(1, 2, 3))  # (B, C, h, w) -> (B,)
    return objective.weighted(loss, noisy.timesteps, settings)
