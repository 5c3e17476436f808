"""Options without effect with flow matching: those of its own groups, and those of all families that need DDPM.

A family with flow matching declares them, with ``library/architectures/common/flow_matching.py``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from library.config.no_effect.declare import IdleRule, idle

_NO_SNR = "with flow matching, whose timesteps --timestep_sampling and --weighting_scheme weigh"
_VELOCITY = "with flow matching, which predicts the velocity between image and noise"

#: options of every script that only change DDPM: dest -> why
DDPM_ONLY = MappingProxyType(
    {
        "min_snr_gamma": _NO_SNR,
        "debiased_estimation_loss": _NO_SNR,
        "v_parameterization": _VELOCITY,
        "scale_v_pred_loss_like_noise_pred": _VELOCITY,
        "v_pred_like_loss": _VELOCITY,
        "sample_sampler": "with flow matching, whose images are always generated with euler",
        "zero_terminal_snr": "with flow matching, whose path ends in pure noise anyway",
    }
)


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


#: of ``WeightingOptions``, in the group "weighting"
WEIGHTING_IDLE_RULES: tuple[IdleRule, ...] = (not_logit_normal, not_mode, nothing_is_weighted)
#: of both, with ``FlowOptions`` in the group "flow"
FLOW_IDLE_RULES: tuple[IdleRule, ...] = (*WEIGHTING_IDLE_RULES, other_density, no_sigmoid, no_fixed_shift)
