"""Noise and loss options without effect."""

from __future__ import annotations

from library.config.arguments import TrainNetworkOptions
from library.config.no_effect.declare import idle


@idle("noise_offset_random_strength", reason="without --noise_offset")
def no_offset_noise(o: TrainNetworkOptions) -> bool:
    return not o.noise.noise_offset


# the offset noise is added only where its strength is not 0, so 0 turns the adaptive scale off as well
@idle("noise_offset", "adaptive_noise_scale", reason="with --noise_offset 0, which is off; leave it out")
def offset_noise_is_zero(o: TrainNetworkOptions) -> bool:
    return o.noise.noise_offset == 0


@idle("multires_noise_discount", reason="without --multires_noise_iterations")
def no_multires_noise(o: TrainNetworkOptions) -> bool:
    return not o.noise.multires_noise_iterations


@idle("multires_noise_iterations", reason="at 0, which is off; leave it out")
def multires_noise_is_zero(o: TrainNetworkOptions) -> bool:
    return o.noise.multires_noise_iterations == 0


@idle("ip_noise_gamma_random_strength", reason="without --ip_noise_gamma")
def no_input_perturbation(o: TrainNetworkOptions) -> bool:
    return not o.noise.ip_noise_gamma


@idle("ip_noise_gamma", reason="at 0, which is off; leave it out")
def input_perturbation_is_zero(o: TrainNetworkOptions) -> bool:
    return o.noise.ip_noise_gamma == 0


@idle("huber_schedule", "huber_c", "huber_scale", reason="without --loss_type huber or smooth_l1")
def no_huber_loss(o: TrainNetworkOptions) -> bool:
    return o.loss.loss_type not in ("huber", "smooth_l1")


@idle("min_snr_gamma", reason="at 0, which is off; leave it out")
def min_snr_is_zero(o: TrainNetworkOptions) -> bool:
    return o.loss.min_snr_gamma == 0


@idle("v_pred_like_loss", reason="at 0, which is off; leave it out")
def v_pred_like_loss_is_zero(o: TrainNetworkOptions) -> bool:
    return o.loss.v_pred_like_loss == 0
