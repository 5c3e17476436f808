"""Options that the families with flow matching share; each joins them to its script, with its own defaults.

A family whose published defaults or choices differ subclasses a group and declares those fields again.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.config.fields import option


@dataclass(frozen=True)
class WeightingOptions:
    """Weighting of timesteps (flow matching)."""

    weighting_scheme: str = option(
        "uniform",
        "logit_normal and mode: which timesteps --timestep_sampling sigma draws; sigma_sqrt and cosmap: their weight "
        "in the loss; none and uniform: all alike",
        choices=["sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"],
    )
    logit_mean: float = option(
        0.0, "mean of logit_normal; above 0 trains less noise, below 0 more", type=float, unit=""
    )
    logit_std: float = option(1.0, "its standard deviation; larger is more even", type=float, unit="")
    mode_scale: float = option(
        1.29, "scale of mode, -1 to 1.75; above 0 trains the middle, below 0 the ends", type=float, unit=""
    )


@dataclass(frozen=True)
class FlowOptions:
    """Flow matching."""

    timestep_sampling: str = option(
        "sigma",
        "how timesteps are drawn: by --weighting_scheme (sigma), evenly (uniform), most in the middle (sigmoid), that "
        "moved towards noise by --discrete_flow_shift (shift) or by the image's size (flux_shift)",
        choices=["sigma", "uniform", "sigmoid", "shift", "flux_shift"],
    )
    sigmoid_scale: float = option(
        1.0, "spread of sigmoid, shift and flux_shift; larger is more even", type=float, unit=""
    )
    model_prediction_type: str = option(
        "sigma_scaled",
        "how the model's output is compared: the velocity itself (raw), times the noise level (sigma_scaled), or taken "
        "as what is added to the noisy image (additive)",
        choices=["raw", "additive", "sigma_scaled"],
    )
    discrete_flow_shift: float = option(
        3.0, "shift of --timestep_sampling sigma and shift; above 1 trains more noise", type=float, unit=""
    )
