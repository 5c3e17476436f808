"""The discrete diffusion process of Stable Diffusion: noise levels, noising, and targets.

A schedule has T steps, T = 1000 for every published model; timesteps count from 0 (least noise) to T - 1.
Shape legend: B batch, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_cumprod`` (T,) float32: the fraction of the signal's variance left at each timestep."""

    alphas_cumprod: Tensor

    @staticmethod
    def scaled_linear(
        num_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Betas whose square roots are evenly spaced (Rombach et al. 2022, arXiv:2112.10752)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        return NoiseSchedule(enforce_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def snr(self) -> Tensor:
        """Signal-to-noise ratio at each timestep (T,): alpha_bar / (1 - alpha_bar)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.alphas_cumprod.to(device))


def enforce_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last step is pure noise and the first stays.

    Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


def _signal_and_noise(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1) in the dtype of ``like``."""
    alphas = schedule.alphas_cumprod[timesteps].view(-1, *([1] * (like.dim() - 1)))
    # rounded last: in bfloat16 1 - alpha_bar would be 0 at the first timesteps
    return alphas.sqrt().to(like.dtype), (1.0 - alphas).sqrt().to(like.dtype)


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    Args:
        latents: x_0, (B, C, h, w).
        noise: eps, like ``latents``.
        timesteps: (B,) int64.
    """
    signal, spread = _signal_and_noise(schedule, timesteps, latents)
    return signal * latents + spread * noise


def velocity(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, arXiv:2202.00512, app. D)."""
    signal, spread = _signal_and_noise(schedule, timesteps, latents)
    return signal * noise - spread * latents
