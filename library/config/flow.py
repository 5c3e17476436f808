"""The common options of families with flow matching, their rules, and the options of DDPM that they ignore.

A family whose published defaults or choices differ subclasses a group and declares those fields again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from library.config.declaration import Declaration, idle
from library.config.fields import option
from library.config.prompt_options import PromptOption, number_above_zero


@dataclass(frozen=True)
class WeightingOptions:
    """Weighting of timesteps (flow matching)."""

    weighting_scheme: str = option(
        "uniform",
        "logit_normal and mode: the distribution of --timestep_sampling sigma; sigma_sqrt and cosmap: their weight "
        "in the loss; none and uniform: all alike",
        choices=["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"],
    )
    logit_mean: float = option(
        0.0, "mean of logit_normal; above 0 trains less noise, below 0 more", type=float, unit=""
    )
    logit_std: float = option(1.0, "its standard deviation; larger is more even", type=float, unit="", above=0)
    mode_scale: float = option(
        1.29,
        "scale of mode, -1 to 1.75; above 0 trains the middle, below 0 the ends",
        type=float,
        unit="",
        minimum=-1,
        maximum=2 / (math.pi - 2),  # the density rises all the way
    )


@dataclass(frozen=True)
class FlowOptions:
    """Flow matching."""

    timestep_sampling: str = option(
        "sigma",
        "distribution of timesteps: by --weighting_scheme (sigma), uniform, most in the middle (sigmoid), that "
        "moved towards noise by --discrete_flow_shift (shift) or by the image's size (flux_shift)",
        choices=["sigma", "uniform", "sigmoid", "shift", "flux_shift"],
    )
    sigmoid_scale: float = option(
        1.0, "spread of sigmoid, shift and flux_shift; larger is more uniform", type=float, unit="", above=0
    )
    model_prediction_type: str = option(
        "sigma_scaled",
        "how the model's output is compared: as velocity (raw), times the noise level (sigma_scaled), or added "
        "to the noisy image (additive)",
        choices=["raw", "additive", "sigma_scaled"],
    )
    discrete_flow_shift: float = option(
        3.0, "shift of --timestep_sampling sigma and shift; above 1 trains more noise", type=float, unit="", above=0
    )


_NO_SNR = "with flow matching, whose timesteps --timestep_sampling and --weighting_scheme weigh"
_VELOCITY = "with flow matching, which predicts the velocity between image and noise"

#: options of every script that only change DDPM: dest -> why
DDPM_ONLY = {
    "min_snr_gamma": _NO_SNR,
    "debiased_estimation_loss": _NO_SNR,
    "v_parameterization": _VELOCITY,
    "scale_v_pred_loss_like_noise_pred": _VELOCITY,
    "v_pred_like_loss": _VELOCITY,
    "sample_sampler": "with flow matching, whose images are always generated with euler",
    "zero_terminal_snr": "with flow matching, whose path ends in pure noise anyway",
}


@idle("logit_mean", "logit_std", reason="without --weighting_scheme logit_normal")
def not_logit_normal(o: Any) -> bool:
    return o.weighting.weighting_scheme != "logit_normal"


@idle("mode_scale", reason="without --weighting_scheme mode")
def not_mode(o: Any) -> bool:
    return o.weighting.weighting_scheme != "mode"


@idle("weighting_scheme", reason="as none is what uniform is: timesteps and loss unchanged")
def nothing_is_weighted(o: Any) -> bool:
    return o.weighting.weighting_scheme == "none"


@idle(
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    reason="at logit_normal or mode without --timestep_sampling sigma, whose timesteps these draw",
)
def other_density(o: Any) -> bool:
    return o.weighting.weighting_scheme in ("logit_normal", "mode") and o.flow.timestep_sampling != "sigma"


@idle("sigmoid_scale", reason="without --timestep_sampling sigmoid, shift or flux_shift")
def no_sigmoid(o: Any) -> bool:
    return o.flow.timestep_sampling not in ("sigmoid", "shift", "flux_shift")


@idle("discrete_flow_shift", reason="without --timestep_sampling sigma or shift")
def no_fixed_shift(o: Any) -> bool:
    return o.flow.timestep_sampling not in ("sigma", "shift")


#: for families with ``WeightingOptions`` in the group "weighting"
WEIGHTING = Declaration(
    groups={"weighting": WeightingOptions},
    idle=(not_logit_normal, not_mode, nothing_is_weighted),
    unused=DDPM_ONLY,
)
#: shift of the noise levels of an image
FLOW_SHIFT = PromptOption("fs", "flow_shift", number_above_zero)
#: for families that also have all of ``FlowOptions``, in the group "flow"
FLOW = Declaration(
    groups={**WEIGHTING.groups, "flow": FlowOptions},
    idle=(*WEIGHTING.idle, other_density, no_sigmoid, no_fixed_shift),
    unused=DDPM_ONLY,
    prompt_options=(FLOW_SHIFT,),
)
