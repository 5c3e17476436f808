"""The published sampler names, each a diffusers scheduler with the noise schedule of training.

This module imports neither torch nor diffusers until a scheduler is made.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError, did_you_mean


@dataclass(frozen=True)
class _Sampler:
    module: str  # of diffusers.schedulers
    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    zero_terminal_snr: bool = False  # whether the class can begin at pure noise


# Only "leading" spacing uses the offset: timesteps 1, 51, ... instead of 0, 50, ..., as SD was released.
_DDIM = _Sampler(
    "scheduling_ddim",
    "DDIMScheduler",
    {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    zero_terminal_snr=True,
)
_PNDM = _Sampler("scheduling_pndm", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1})
_LMS = _Sampler("scheduling_lms_discrete", "LMSDiscreteScheduler", {"steps_offset": 1})
_EULER = _Sampler("scheduling_euler_discrete", "EulerDiscreteScheduler", {"steps_offset": 1}, zero_terminal_snr=True)
_EULER_A = _Sampler(
    "scheduling_euler_ancestral_discrete",
    "EulerAncestralDiscreteScheduler",
    {"steps_offset": 1},
    zero_terminal_snr=True,
)
_HEUN = _Sampler("scheduling_heun_discrete", "HeunDiscreteScheduler", {"steps_offset": 1})
_DPM_2 = _Sampler("scheduling_k_dpm_2_discrete", "KDPM2DiscreteScheduler", {"steps_offset": 1})
_DPM_2_A = _Sampler("scheduling_k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", {"steps_offset": 1})
# DPM-Solver's noise-prediction form is not defined at sigma 0 (Lu et al. 2022, arXiv:2206.00927), so it ends before
_DPMSOLVER = _Sampler(
    "scheduling_dpmsolver_multistep",
    "DPMSolverMultistepScheduler",
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "steps_offset": 1},
    zero_terminal_snr=True,
)
_DPMSOLVER_PP = _Sampler(
    "scheduling_dpmsolver_multistep",
    "DPMSolverMultistepScheduler",
    {"algorithm_type": "dpmsolver++", "steps_offset": 1},
    zero_terminal_snr=True,
)
_DPMSINGLE = _Sampler("scheduling_dpmsolver_singlestep", "DPMSolverSinglestepScheduler", {"lower_order_final": True})

_SAMPLERS: Mapping[str, _Sampler] = {
    "ddim": _DDIM,
    "pndm": _PNDM,
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": _HEUN,
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": _DPMSOLVER,
    "dpmsolver++": _DPMSOLVER_PP,
    "dpmsingle": _DPMSINGLE,
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
}

#: in the published order
SAMPLER_NAMES = tuple(_SAMPLERS)


def check_sampler(name: str, *, v_prediction: bool, zero_terminal_snr: bool) -> None:
    """Refuse a sampler that cannot work with the model, without importing anything.

    Raises:
        UserError: unknown name, or zero terminal SNR with a sampler or a prediction type that lacks it.
    """
    if name not in _SAMPLERS:
        raise UserError(f'unknown sampler "{name}"{did_you_mean(name, SAMPLER_NAMES)}')
    if not zero_terminal_snr:
        return
    if not v_prediction:
        # without signal the noise does not determine the image: x0 = (x - 1 * eps) / 0
        raise UserError("zero terminal SNR: sampling needs a v-prediction model (--v_parameterization)")
    if not _SAMPLERS[name].zero_terminal_snr:
        able = ", ".join(other for other, sampler in _SAMPLERS.items() if sampler.zero_terminal_snr)
        raise UserError(f'zero terminal SNR: the sampler "{name}" does not support it; use one of {able}')


def create_scheduler_for(
    name: str,
    *,
    v_prediction: bool,
    zero_terminal_snr: bool = False,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
) -> Any:
    """Make the diffusers scheduler of a published sampler name.

    Betas follow the "scaled linear" schedule of Stable Diffusion (linear in the square root of beta). Zero
    terminal SNR rescales them and takes "trailing" timesteps, so that sampling begins at the last one
    (Lin et al. 2023, arXiv:2305.08891, algorithm 1 and section 3.3).

    Raises:
        UserError: as ``check_sampler``.
    """
    check_sampler(name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    sampler = _SAMPLERS[name]
    settings = dict(
        sampler.settings,
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if v_prediction else "epsilon",
    )
    if zero_terminal_snr:
        settings.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    module = importlib.import_module(f"diffusers.schedulers.{sampler.module}")
    scheduler_class = getattr(module, sampler.class_name)
    if sampler is _LMS:
        scheduler_class = _with_exact_coefficients(scheduler_class)
    with warnings.catch_warnings():
        # diffusers deprecates DPM-Solver's first form, which is a published choice here
        warnings.simplefilter("ignore", FutureWarning)
        return scheduler_class(**settings)


def set_timesteps(scheduler: Any, steps: int, device: Any = None) -> None:
    """Call ``scheduler.set_timesteps``, with only timesteps that the model was trained on.

    diffusers' "trailing" spacing yields one more, -1, for some counts such as 61, by rounding; its "leading"
    spacing with offset yields 1000 for a thousand steps.
    """
    scheduler.set_timesteps(steps, device=device)
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:steps]
        if getattr(scheduler, "sigmas", None) is not None:
            scheduler.sigmas = scheduler.sigmas[[*range(steps), -1]]  # the last sigma is the end of the last step
    scheduler.timesteps = scheduler.timesteps.clamp(max=scheduler.config.num_train_timesteps - 1)


def _with_exact_coefficients(lms_class: type) -> type:
    """LMS with its integrals in closed form: exact, and without the optional dependency on SciPy."""
    from numpy.polynomial import Polynomial

    class LMSDiscreteScheduler(lms_class):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            """Integral of a Lagrange basis polynomial over the next step (Hairer et al. 1993, III.1)."""
            origin = float(self.sigmas[t])  # keeps the powers small
            nodes = [float(self.sigmas[t - k]) - origin for k in range(order)]
            own = nodes.pop(current_order)
            basis = Polynomial.fromroots(nodes) if nodes else Polynomial([1.0])
            integral = basis.integ()
            return (integral(float(self.sigmas[t + 1]) - origin) - integral(0.0)) / basis(own)

    return LMSDiscreteScheduler
