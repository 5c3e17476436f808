"""Options of noise, timesteps and loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.declaration import Declaration, Facts, Finding, error, idle, warning
from library.config.fields import option


@dataclass(frozen=True)
class NoiseOptions:
    """Noise and timesteps."""

    noise_offset: float | None = option(
        None,
        "noise offset: adds a constant per channel to the noise, for darker and brighter images; 0.1 is common",
        type=float,
        neutral=(0,),
        unit="standard deviations of the noise",
    )
    noise_offset_random_strength: bool = option(False, "draw the offset's strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(
        None,
        "adds the latents' mean times this to --noise_offset",
        type=float,
        neutral=(0,),
        unit="",
    )
    multires_noise_iterations: int | None = option(
        None,
        "multi-resolution noise: adds coarser noise in this many layers; 6 to 10 are common",
        type=int,
        neutral=(0,),
        unit="layers",
        minimum=0,
    )
    multires_noise_discount: float = option(
        0.3, "weight of each coarser layer relative to the one before", type=float, unit="", minimum=0
    )
    ip_noise_gamma: float | None = option(
        None,
        "input perturbation: adds noise to the model's input only; 0.1 is common",
        type=float,
        neutral=(0,),
        unit="standard deviations of the noise",
        minimum=0,
    )
    ip_noise_gamma_random_strength: bool = option(False, "draw its strength between 0 and --ip_noise_gamma")
    zero_terminal_snr: bool = option(False, "change the noise schedule so that it ends in pure noise")
    min_timestep: int | None = option(
        None, "lowest trained timestep, 0 to 999", type=int, neutral=(0,), unit="timestep, 0 to 1000"
    )
    max_timestep: int | None = option(
        None,
        "end of the trained timesteps, not included, 1 to 1000",
        type=int,
        neutral=(1000,),
        unit="timestep, 0 to 1000",
    )


@dataclass(frozen=True)
class LossOptions:
    """Loss."""

    loss_type: str = option("l2", "loss between prediction and target", choices=["l1", "l2", "huber", "smooth_l1"])
    huber_schedule: str = option(
        "snr",
        "how the threshold of huber and smooth_l1 depends on the timestep",
        choices=["constant", "exponential", "snr"],
    )
    huber_c: float = option(0.1, "that threshold", type=float, unit="", above=0)
    huber_scale: float = option(1.0, "a factor of it", type=float, unit="", above=0)
    min_snr_gamma: float | None = option(
        None, "gamma of min-SNR loss weighting; 5 in the paper", type=float, neutral=(0,), unit="SNR", minimum=0
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "scale the loss of v-prediction to that of noise prediction"
    )
    v_pred_like_loss: float | None = option(
        None,
        "adds the loss of v-prediction with this weight, for models that predict noise",
        type=float,
        neutral=(0,),
        unit="",
        minimum=0,
    )
    debiased_estimation_loss: bool = option(False, "debiased estimation: weight timesteps by 1 / sqrt(SNR)")
    prior_loss_weight: float = option(1.0, "loss weight of regularization images", type=float, unit="", minimum=0)
    masked_loss: bool = option(False, "masked loss by mask images, see --conditioning_data_dir")


# ---- what cannot work ----


def timestep_range(o: Any, facts: Facts) -> Iterator[Finding]:
    low = o.noise.min_timestep if o.noise.min_timestep is not None else 0
    high = o.noise.max_timestep if o.noise.max_timestep is not None else 1000
    if not 0 <= low < high <= 1000:
        yield error(f"--min_timestep {low} and --max_timestep {high}: 0 <= min < max <= 1000 must hold")


def v_prediction(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.loss.scale_v_pred_loss_like_noise_pred and not o.model.v_parameterization:
        yield error("--scale_v_pred_loss_like_noise_pred: only for models that predict v (--v_parameterization)")
    if o.loss.v_pred_like_loss and o.model.v_parameterization:
        yield error("--v_pred_like_loss: only for models that predict noise; remove it or --v_parameterization")
    if o.noise.zero_terminal_snr and not o.model.v_parameterization:
        yield warning("--zero_terminal_snr is for models that predict v (--v_parameterization)")


# ---- what has no effect ----


@idle("noise_offset_random_strength", "adaptive_noise_scale", reason="without --noise_offset")
def no_offset_noise(o: Any) -> bool:
    return not o.noise.noise_offset


@idle("multires_noise_discount", reason="without --multires_noise_iterations")
def no_multires_noise(o: Any) -> bool:
    return not o.noise.multires_noise_iterations


@idle("ip_noise_gamma_random_strength", reason="without --ip_noise_gamma")
def no_input_perturbation(o: Any) -> bool:
    return not o.noise.ip_noise_gamma


@idle("huber_schedule", "huber_c", "huber_scale", reason="without --loss_type huber or smooth_l1")
def no_huber_loss(o: Any) -> bool:
    return o.loss.loss_type not in ("huber", "smooth_l1")


DECLARATION = Declaration(
    groups={"noise": NoiseOptions, "loss": LossOptions},
    rules=(
        timestep_range,
        v_prediction,
    ),
    idle=(
        no_offset_noise,
        no_multires_noise,
        no_input_perturbation,
        no_huber_loss,
    ),
)
