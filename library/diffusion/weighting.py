"""Weight a sample's loss by its timestep; all functions take (B,) timesteps or noise levels and return (B,) float32.

SNR is alpha_bar / (1 - alpha_bar). A schedule with zero terminal SNR has SNR 0 at its last step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.diffusion.ddpm import NoiseSchedule

#: SNRs above this are treated alike, so that weights at the first timesteps do not vanish
_MAX_DEBIASED_SNR = 1000.0
#: keeps a division by the SNR finite at a zero terminal SNR
_MIN_SNR = 1e-8
#: SNRs below this are treated alike where a weight grows with 1 / SNR. The plain schedule ends at 0.0047, so only
#: zero terminal SNR goes below, where the last weights would be 1e4 (debiased) and 1e8 (v_pred_like)
_MIN_WEIGHT_SNR = 4e-3
#: the lowest of the thousand noise levels of flow matching; below it sigma^-2 would grow without bound
_MIN_SIGMA = 1e-3


def min_snr_weight(timesteps: Tensor, schedule: NoiseSchedule, gamma: float, v_prediction: bool) -> Tensor:
    """min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for v-prediction.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv:2303.09556): a weight of
    min(SNR, gamma) on the error of x_0. For one x_t, an error of x_0 is sqrt(SNR) times as large in eps, and
    sqrt(SNR + 1) times in v, so that is what its square is divided by.
    """
    snr = schedule.snr()[timesteps]
    clipped = snr.clamp(max=gamma)
    if v_prediction:
        return clipped / (snr + 1.0)
    # the limit of min(SNR, gamma) / SNR for SNR -> 0 is 1
    return clipped.clamp(min=_MIN_SNR) / snr.clamp(min=_MIN_SNR)


def scale_v_pred_like_noise(timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """SNR / (SNR + 1): the factor between the v-prediction loss and the noise-prediction loss of one error.

    With v = (eps - sqrt(1 - alpha_bar) x_t) / sqrt(alpha_bar) for a given x_t, an error of v is one of eps
    divided by sqrt(alpha_bar), and alpha_bar = SNR / (SNR + 1) (Salimans & Ho 2022, arXiv:2202.00512).
    """
    snr = schedule.snr()[timesteps]
    return snr / (snr + 1.0)


def v_pred_like_weight(timesteps: Tensor, schedule: NoiseSchedule, strength: float) -> Tensor:
    """1 + strength * (SNR + 1) / SNR: adds the v-prediction loss of the same error to a noise-prediction loss.

    The inverse of ``scale_v_pred_like_noise``, with the SNR at least 0.004; so at most 1 + 251 strength.
    """
    snr = schedule.snr()[timesteps].clamp(min=_MIN_WEIGHT_SNR)
    return 1.0 + strength / (snr / (snr + 1.0))


def debiased_weight(timesteps: Tensor, schedule: NoiseSchedule, v_prediction: bool) -> Tensor:
    """1 / sqrt(SNR) for noise prediction, 1 / (SNR + 1) for v-prediction, with the SNR at most 1000.

    Yu et al. 2023 (arXiv:2310.08442) for noise prediction: the factor between an error of x_0 and one of eps.
    There the SNR is at least 0.004, as in ``v_pred_like_weight``. They give none for v; 1 / (SNR + 1) is the factor
    between the squares of an error of x_0 and one of v, so that every timestep counts alike in x_0.
    """
    snr = schedule.snr()[timesteps].clamp(max=_MAX_DEBIASED_SNR)
    if v_prediction:
        return 1.0 / (snr + 1.0)
    return 1.0 / snr.clamp(min=_MIN_WEIGHT_SNR).sqrt()


#: values of ``--weighting_scheme``; logit_normal and mode are densities of the timesteps, not weights
WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


def flow_weight(sigmas: Tensor, weighting_scheme: str) -> Tensor:
    """``sigma_sqrt``: sigma^-2, sigma at least 0.001. ``cosmap``: 2 / (pi (1 - 2 sigma + 2 sigma^2)). Others: 1.

    Esser et al. 2024 (arXiv:2403.03206), section 3.1; the names are those of diffusers'
    ``compute_loss_weighting_for_sd3``.

    Args:
        sigmas: noise levels (B,), 0 to 1.
    """
    if weighting_scheme == "sigma_sqrt":
        return sigmas.clamp(min=_MIN_SIGMA) ** -2.0
    if weighting_scheme == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * sigmas + 2.0 * sigmas.square()))
    return torch.ones_like(sigmas)
