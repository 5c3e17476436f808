"""Noise and loss options without effect."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle


@idle("noise_offset_random_strength", "adaptive_noise_scale", reason="without --noise_offset")
def no_offset_noise(o: TrainNetworkOptions) -> bool:
    return not o.noise.noise_offset


@idle("multires_noise_discount", reason="without --multires_noise_iterations")
def no_multires_noise(o: TrainNetworkOptions) -> bool:
    return not o.noise.multires_noise_iterations


@idle("ip_noise_gamma_random_strength", reason="without --ip_noise_gamma")
def no_input_perturbation(o: TrainNetworkOptions) -> bool:
    return not o.noise.ip_noise_gamma


@idle("huber_schedule", "huber_c", "huber_scale", reason="without --loss_type huber or smooth_l1")
def no_huber_loss(o: TrainNetworkOptions) -> bool:
    return o.loss.loss_type not in ("huber", "smooth_l1")
