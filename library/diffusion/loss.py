"""Compare prediction and target element by element.

Shape legend: B batch, C latent channels, (h, w) latent size, T number of timesteps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from library.diffusion.ddpm import NoiseSchedule
from library.diffusion.flow import TIMESTEPS


def conditional_loss(prediction: Tensor, target: Tensor, loss_type: str, huber_c: Tensor | None = None) -> Tensor:
    """Unreduced loss (B, C, h, w).

    ``l2``: (p - t)^2. ``l1``: |p - t|. ``huber``: 2c (sqrt((p - t)^2 + c^2) - c), the pseudo-Huber loss
    (as in Khrapov et al. 2024, arXiv:2403.16728), which is (p - t)^2 for small differences.
    ``smooth_l1``: 2 (sqrt((p - t)^2 + c^2) - c), which is 2 |p - t| for large ones.

    Args:
        huber_c: (B,) thresholds for ``huber`` and ``smooth_l1``.

    Raises:
        ValueError: an unknown ``loss_type``, or ``huber_c`` is missing.
    """
    difference = prediction - target
    if loss_type == "l2":
        return difference.square()
    if loss_type == "l1":
        return difference.abs()
    if loss_type not in ("huber", "smooth_l1"):
        raise ValueError(f"unknown loss type {loss_type!r}")
    if huber_c is None:
        raise ValueError(f"loss type {loss_type!r} needs huber_c")
    c = huber_c.view(-1, *([1] * (prediction.dim() - 1)))  # (B,) -> (B, 1, 1, 1)
    # the same as 2 (sqrt(d^2 + c^2) - c), without the cancellation of nearly equal numbers
    smooth = 2.0 * difference.square() / ((difference.square() + c.square()).sqrt() + c)
    return c * smooth if loss_type == "huber" else smooth


def masked(loss: Tensor, masks: Tensor | None) -> Tensor:
    """Return the unreduced loss (B, C, h, w) times weights (B, H, W), averaged over the pixels of each latent pixel.

    The mean that follows is over all elements, so a sample counts by the fraction of it that is learned.
    """
    if masks is None:
        return loss
    weights = F.interpolate(masks.to(loss.dtype).unsqueeze(1), size=loss.shape[-2:], mode="area")  # (B, 1, h, w)
    return loss * weights


def huber_threshold(
    timesteps: Tensor, schedule: NoiseSchedule, huber_schedule: str, huber_c: float, huber_scale: float
) -> Tensor:
    """``threshold_at`` for the timesteps (B,) int64 of a DDPM schedule: sigma = sqrt((1 - alpha_bar) / alpha_bar)."""
    alphas = schedule.alphas_cumprod[timesteps]
    sigma = ((1.0 - alphas) / alphas).sqrt()
    return threshold_at(timesteps, schedule.num_timesteps, sigma, huber_schedule, huber_c, huber_scale)


def flow_huber_threshold(timesteps: Tensor, huber_schedule: str, huber_c: float, huber_scale: float) -> Tensor:
    """``threshold_at`` for the timesteps (B,) float32, 0 to 1000, of flow matching.

    There x_t has (1 - t) of the image and t of the noise, so the ratio of noise to signal is t / (1 - t).
    """
    level = timesteps / TIMESTEPS
    return threshold_at(timesteps, TIMESTEPS, level / (1.0 - level), huber_schedule, huber_c, huber_scale)


def threshold_at(
    timesteps: Tensor,
    num_timesteps: int,
    noise_to_signal: Tensor,
    huber_schedule: str,
    huber_c: float,
    huber_scale: float,
) -> Tensor:
    """The threshold c of each sample (B,) float32, by timestep: large, so like L2, where there is little noise.

    After Khrapov et al. 2024 (arXiv:2403.16728). ``constant``: c. ``exponential``: exp(t ln(c) / T), from 1 at t = 0
    towards c. ``snr``: (1 - c) / (1 + sigma)^2 + c, sigma the ratio of noise to signal. All times ``huber_scale``.

    Args:
        timesteps: t, (B,).
        num_timesteps: T.
        noise_to_signal: the ratio of standard deviations at each, (B,); may be infinite.
        huber_c: c, greater than 0.

    Raises:
        ValueError: an unknown ``huber_schedule``.
    """
    if huber_schedule == "constant":
        threshold = torch.full(timesteps.shape, huber_c, dtype=torch.float32, device=timesteps.device)
    elif huber_schedule == "exponential":
        threshold = torch.exp(timesteps * (math.log(huber_c) / num_timesteps))
    elif huber_schedule == "snr":
        threshold = (1.0 - huber_c) / (1.0 + noise_to_signal).square() + huber_c
    else:
        raise ValueError(f"unknown huber schedule {huber_schedule!r}")
    return threshold * huber_scale
