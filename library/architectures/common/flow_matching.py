"""The common part of families trained by flow matching: options, rules, records and the objective.

A family puts ``FlowMatching`` before its other bases and joins its own declaration to ``FLOW``. A family with fewer
published options declares the groups and rules that it has, and overrides ``objective``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from library.architectures.base import Architecture
from library.config.flow import FLOW, FLOW_SHIFT, FlowOptions, WeightingOptions
from library.config.prompt_options import DDPM_FIELDS

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.image_settings import ImageSettings
    from library.diffusion.objective import FlowObjective


class FlowMatching(Architecture):
    """Rectified flow, as Esser et al. 2024 (arXiv:2403.03206), with the options of ``config/flow.py``."""

    declaration = FLOW
    sample_fields = DDPM_FIELDS - {"sample_sampler"}
    #: latent cells per image token; shifts by resolution count tokens
    cells_per_token = 4
    #: shift of sampling; None: by resolution, as FLUX.1 [dev]
    sampling_shift: float | None = None

    def objective(self, *, v_prediction: bool, zero_terminal_snr: bool) -> FlowObjective:
        from library.diffusion.objective import FlowObjective

        weighting, flow = self.chosen(WeightingOptions), self.chosen(FlowOptions)
        return FlowObjective(
            timestep_sampling=flow.timestep_sampling,
            weighting_scheme=weighting.weighting_scheme,
            logit_mean=weighting.logit_mean,
            logit_std=weighting.logit_std,
            mode_scale=weighting.mode_scale,
            sigmoid_scale=flow.sigmoid_scale,
            shift=flow.discrete_flow_shift,
            prediction_type=flow.model_prediction_type,
            cells_per_token=self.cells_per_token,
            sampling_shift=self.sampling_shift,
        )

    def for_image(self, settings: ImageSettings) -> Self:
        """Return this family with the prompt's ``--fs``."""
        shift = settings.own.get(FLOW_SHIFT.field)
        if shift is None:
            return self
        made = copy.copy(self)
        made.sampling_shift = shift
        return made

    def flow_metadata(self) -> dict[str, str]:
        """Return the ss_* keys of these options, for ``metadata``."""
        weighting, flow = self.chosen(WeightingOptions), self.chosen(FlowOptions)
        return {f"ss_{name}": str(value) for name, value in {**vars(weighting), **vars(flow)}.items()}
