"""Rectified flow: a straight path from image to noise, and the predictions of models on it.

Liu et al. 2022 (arXiv:2209.03003), Lipman et al. 2022 (arXiv:2210.02747), Esser et al. 2024 (arXiv:2403.03206).
The noise level sigma goes from 0, the image, to 1, pure noise; a timestep is 1000 sigma, any number in between.
Shape legend: B batch, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

#: timesteps are noise levels times this
TIMESTEPS = 1000

Number = TypeVar("Number", float, Tensor)


def like_samples(values: Tensor, samples: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), in the dtype of ``samples`` (B, C, h, w)."""
    return values.view(-1, *([1] * (samples.dim() - 1))).to(samples.dtype)


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_t = (1 - sigma) x_0 + sigma eps (Liu et al. 2022, eq. 1; Esser et al. 2024, eq. 13).

    Args:
        latents: x_0, (B, C, h, w).
        noise: eps, like ``latents``.
        sigmas: (B,), 0 to 1.
    """
    sigma = like_samples(sigmas, latents)
    return (1.0 - sigma) * latents + sigma * noise


def flow_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dsigma = eps - x_0, the same all along the path; (B, C, h, w)."""
    return noise - latents


def shift_sigma(sigmas: Number, shift: float) -> Number:
    """Move noise levels towards noise (shift above 1) or towards the image: s sigma / (1 + (s - 1) sigma).

    Esser et al. 2024, eq. 23: with s = sqrt(m / n), an image of m pixels is as noisy as one of n was before.
    It adds ln(s) to logit(sigma), so shifts multiply, and 1 / s undoes s.
    """
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def resolution_shift(tokens: float) -> float:
    """Return the shift exp(mu) for an image of so many tokens: mu is linear, 0.5 at 256 and 1.15 at 4096 tokens.

    That of FLUX.1 [dev] and Lumina-Image 2.0 (``calculate_shift`` in their pipelines of diffusers).
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (tokens - 256))


# ---- what a model's output means ----


def training_target(latents: Tensor, noise: Tensor, sigmas: Tensor, prediction_type: str) -> Tensor:
    """Return the target of ``comparable`` of the output, (B, C, h, w).

    ``raw``: the velocity v. ``sigma_scaled``: the error of x_0 is measured instead of that of v, and for one x_t it is
    sigma times as large, as x_0 = x_t - sigma v (the preconditioning of Esser et al. 2024's reference training).
    ``additive``: the output is added to the noisy latents to give x_0, so it is x_0 - x_t = -sigma v.
    """
    velocity = flow_velocity(latents, noise)
    if prediction_type == "raw":
        return velocity
    scaled = like_samples(sigmas, latents) * velocity
    return scaled if prediction_type == "sigma_scaled" else -scaled


def comparable(output: Tensor, sigmas: Tensor, prediction_type: str) -> Tensor:
    """Return the model's output (B, C, h, w) in the form of ``training_target``."""
    return like_samples(sigmas, output) * output if prediction_type == "sigma_scaled" else output


def velocity_of_output(output: Tensor, sigmas: Tensor, prediction_type: str) -> Tensor:
    """Return the velocity that a sampler follows, (B, C, h, w); sigmas (B,) above 0."""
    return -output / like_samples(sigmas, output) if prediction_type == "additive" else output


# ---- sampling ----


def sampling_sigmas(steps: int, shift: float, end: float | None = None) -> Tensor:
    """Return the noise levels of sampling, (steps + 1,) float32: evenly from 1 to 1 / steps, shifted, and 0 at the end.

    As diffusers' pipelines of FLUX.1 set them, which give ``np.linspace(1, 1 / steps, steps)`` to the scheduler.

    Args:
        end: the least level that the scheduler was made with: the levels then go evenly to ``end``, itself shifted, as
            diffusers' pipelines set them that give the scheduler a number of steps alone.
    """
    last = 1.0 / steps if end is None else shift_sigma(end, shift)
    even = torch.linspace(1.0, last, steps, dtype=torch.float64)
    return torch.cat([shift_sigma(even, shift), torch.zeros(1, dtype=torch.float64)]).float()


class FlowEuler:
    """Euler's method along the flow, with the interface of a diffusers scheduler.

    Equal to ``FlowMatchEulerDiscreteScheduler``, static shift or dynamic.

    Args:
        steps: at least 1.
        shift: of the noise levels; for a dynamic one, ``resolution_shift``.
        device: of the latents.
        end: as for ``sampling_sigmas``.
    """

    init_noise_sigma = 1.0

    def __init__(
        self, steps: int, shift: float, device: torch.device | str = "cpu", *, end: float | None = None
    ) -> None:
        self.sigmas = sampling_sigmas(steps, shift, end)
        self.timesteps = (self.sigmas[:-1] * TIMESTEPS).to(device)  # (steps,) float32
        self._done = 0

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(self, velocity: Tensor, timestep: Any, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The next latents (B, C, h, w); called once for each timestep, in their order."""
        change = float(self.sigmas[self._done + 1] - self.sigmas[self._done])
        self._done += 1
        return (sample + change * velocity,)
