"""One batch to one loss: what every trainer and every family shares, on one screen.

Shape legend: B batch, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture, Conditioning
from library.data.dataset import Batch
from library.diffusion import loss as losses
from library.diffusion import noise as noises
from library.diffusion import timesteps as times
from library.diffusion import weighting
from library.diffusion.ddpm import NoiseSchedule, add_noise, velocity
from library.randomness import torch_generator


@dataclass(frozen=True)
class NoiseSettings:
    """How latents are made noisy; see ``library.diffusion.noise`` for each formula."""

    offset: float | None = None
    offset_random_strength: bool = False
    adaptive_scale: float | None = None
    multires_iterations: int | None = None
    multires_discount: float = 0.3
    ip_gamma: float | None = None
    ip_gamma_random_strength: bool = False
    min_timestep: int = 0
    max_timestep: int = 1000


@dataclass(frozen=True)
class LossSettings:
    """How prediction and target are compared; see ``library.diffusion.loss`` and ``weighting``."""

    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_like_noise_pred: bool = False
    v_pred_like_weight: float | None = None
    debiased: bool = False


@dataclass(frozen=True)
class NoisyBatch:
    """What the denoiser is asked and what it should answer."""

    noisy: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int64, 0..999
    target: Tensor  # (B, C, h, w): the noise, or the velocity for v-prediction


def _generators(visits: Sequence[int], purpose: str) -> list[torch.Generator]:
    return [torch_generator(visit, purpose) for visit in visits]


def make_noisy(
    latents: Tensor,
    visits: Sequence[int],
    schedule: NoiseSchedule,
    settings: NoiseSettings,
    *,
    v_prediction: bool,
    timestep: int | None = None,
) -> NoisyBatch:
    """Noise scaled latents (B, C, h, w) at a random timestep each, or all at one; every draw is keyed by the visit."""
    device = latents.device
    noise = noises.draw_noise(tuple(latents.shape[1:]), _generators(visits, "noise")).to(device, non_blocking=True)
    if settings.multires_iterations:
        noise = noises.pyramid_noise(
            noise,
            _generators(visits, "multires noise"),
            iterations=settings.multires_iterations,
            discount=settings.multires_discount,
        )
    if settings.offset:
        noise = noises.offset_noise(
            noise,
            latents,
            _generators(visits, "noise offset"),
            offset=settings.offset,
            random_strength=settings.offset_random_strength,
            adaptive_scale=settings.adaptive_scale,
        )
    timesteps = torch.tensor(
        [
            times.sample_timestep(generator, settings.min_timestep, settings.max_timestep)
            for generator in _generators(visits, "timestep")
        ]
        if timestep is None
        else [timestep] * len(visits),
        dtype=torch.long,
    ).to(device, non_blocking=True)
    input_noise = noise
    if settings.ip_gamma:
        # only the input is perturbed: the target stays the clean noise (Ning et al. 2023, alg. 1)
        input_noise = noises.perturb_input(
            noise,
            _generators(visits, "ip noise"),
            gamma=settings.ip_gamma,
            random_strength=settings.ip_gamma_random_strength,
        )
    noisy = add_noise(schedule, latents, input_noise, timesteps)
    target = velocity(schedule, latents, noise, timesteps) if v_prediction else noise
    return NoisyBatch(noisy, timesteps, target)


def sample_losses(
    prediction: Tensor,
    noisy: NoisyBatch,
    schedule: NoiseSchedule,
    settings: LossSettings,
    *,
    v_prediction: bool,
    masks: Tensor | None = None,
) -> Tensor:
    """Weighted loss of each sample: predictions (B, C, h, w) -> (B,) float32.

    Args:
        masks: (B, H, W) weights of the pictures' pixels.
    """
    huber_c = None
    if settings.loss_type in ("huber", "smooth_l1"):
        huber_c = losses.huber_threshold(
            noisy.timesteps, schedule, settings.huber_schedule, settings.huber_c, settings.huber_scale
        )
    loss = losses.conditional_loss(prediction.float(), noisy.target.float(), settings.loss_type, huber_c=huber_c)
    loss = losses.masked(loss, masks).mean(dim=(1, 2, 3))  # (B, C, h, w) -> (B,)
    if settings.min_snr_gamma:
        loss = loss * weighting.min_snr_weight(noisy.timesteps, schedule, settings.min_snr_gamma, v_prediction)
    if settings.scale_v_pred_like_noise_pred:
        loss = loss * weighting.scale_v_pred_like_noise(noisy.timesteps, schedule)
    if settings.v_pred_like_weight:
        loss = loss * weighting.v_pred_like_weight(noisy.timesteps, schedule, settings.v_pred_like_weight)
    if settings.debiased:
        loss = loss * weighting.debiased_weight(noisy.timesteps, schedule, v_prediction)
    return loss


def batch_losses(
    architecture: Architecture,
    denoiser: nn.Module,
    batch: Batch,
    latents: Tensor,
    conditioning: Conditioning,
    schedule: NoiseSchedule,
    noise: NoiseSettings,
    loss: LossSettings,
    *,
    v_prediction: bool,
    dtype: torch.dtype,
    timestep: int | None = None,
) -> Tensor:
    """The loss of each sample (B,), with a graph back to whatever is trained.

    Args:
        latents: (B, C, h, w) as the cache stores them, on the denoiser's device.
        conditioning: encoded inside the caller's autocast, so that trained encoders get gradients.
        dtype: of the frozen denoiser's weights, which its inputs are cast to.
        timestep: of all samples; one drawn for each, if not given.
    """
    conditioning = architecture.with_sizes(
        conditioning, original=batch.original_sizes, top_left=batch.crop_top_lefts, target=batch.target_sizes
    )
    scaled = architecture.scale_latents(latents)
    noisy = make_noisy(scaled, batch.visits, schedule, noise, v_prediction=v_prediction, timestep=timestep)
    prediction = architecture.predict(denoiser, noisy.noisy.to(dtype), noisy.timesteps, conditioning)
    return sample_losses(prediction, noisy, schedule, loss, v_prediction=v_prediction, masks=batch.loss_masks)
