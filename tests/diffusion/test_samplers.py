"""Every published sampler name draws from a distribution whose perfect denoiser is known."""

from __future__ import annotations

import inspect

import pytest
import torch

from library.diffusion.samplers import SAMPLER_NAMES, check_sampler, create_scheduler_for, set_timesteps
from library.errors import UserError

# diffusers hands tensors to NumPy in a way that NumPy 2 grumbles about
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DATA_STD = 0.5
PUBLISHED = (
    "ddim pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle "
    "k_lms k_euler k_euler_a k_dpm_2 k_dpm_2_a"
).split()
ZERO_TERMINAL_SNR = ("ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++", "k_euler", "k_euler_a")


def alpha_bar(scheduler, timestep: torch.Tensor) -> torch.Tensor:
    """Cumulative alpha at a possibly fractional timestep."""
    low = int(timestep)
    high, weight = min(low + 1, 999), float(timestep) - low
    return scheduler.alphas_cumprod[low] * (1 - weight) + scheduler.alphas_cumprod[high] * weight


def draw(name: str, steps: int, *, v_prediction: bool = False, zero_terminal_snr: bool = False) -> torch.Tensor:
    """Sample data distributed as N(0, DATA_STD^2) with the exact model of that distribution."""
    scheduler = create_scheduler_for(name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    set_timesteps(scheduler, steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 32, 32, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        a = alpha_bar(scheduler, timestep)
        variance = a * DATA_STD**2 + 1 - a
        noise = scaled * (1 - a) ** 0.5 / variance
        clean = scaled * a**0.5 * DATA_STD**2 / variance
        output = a**0.5 * noise - (1 - a) ** 0.5 * clean if v_prediction else noise
        x = scheduler.step(output, timestep, x, **extra).prev_sample
    return x


def test_names_are_the_published_ones() -> None:
    assert list(SAMPLER_NAMES) == PUBLISHED


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_samples_have_the_spread_of_the_data(name: str, v_prediction: bool) -> None:
    assert draw(name, 3, v_prediction=v_prediction).isfinite().all()
    spread = draw(name, 50, v_prediction=v_prediction).std().item()
    assert spread == pytest.approx(DATA_STD, rel=0.13)


@pytest.mark.parametrize("name", ZERO_TERMINAL_SNR)
def test_zero_terminal_snr(name: str) -> None:
    scheduler = create_scheduler_for(name, v_prediction=True, zero_terminal_snr=True)
    set_timesteps(scheduler, 10)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[999] < 1e-7
    spread = draw(name, 50, v_prediction=True, zero_terminal_snr=True).std().item()
    assert spread == pytest.approx(DATA_STD, rel=0.13)


@pytest.mark.parametrize("steps", [61, 103, 122])  # counts for which "trailing" spacing rounds to one step too many
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++"])
def test_zero_terminal_snr_for_awkward_counts(name: str, steps: int) -> None:
    scheduler = create_scheduler_for(name, v_prediction=True, zero_terminal_snr=True)
    set_timesteps(scheduler, steps)
    assert len(scheduler.timesteps) == steps
    assert scheduler.timesteps.min() >= 0
    spread = draw(name, steps, v_prediction=True, zero_terminal_snr=True).std().item()
    assert spread == pytest.approx(DATA_STD, rel=0.13)


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
@pytest.mark.parametrize("name", SAMPLER_NAMES[:11])
def test_timesteps_are_trained_ones(name: str, steps: int) -> None:
    scheduler = create_scheduler_for(name, v_prediction=False)
    set_timesteps(scheduler, steps)
    assert scheduler.timesteps.min() >= 0
    assert scheduler.timesteps.max() <= 999


def test_thousand_steps_of_the_offset_schedulers() -> None:
    assert draw("ddim", 1000).std().item() == pytest.approx(DATA_STD, rel=0.05)


def test_training_schedule() -> None:
    scheduler = create_scheduler_for("ddim", v_prediction=False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert scheduler.config.prediction_type == "epsilon"
    set_timesteps(scheduler, 20)
    assert scheduler.timesteps.tolist()[-2:] == [51, 1]


def test_lms_coefficients_against_fine_sums() -> None:
    scheduler = create_scheduler_for("lms", v_prediction=False)
    set_timesteps(scheduler, 12)
    sigmas = scheduler.sigmas.double()
    t, order = 6, 4
    tau = torch.linspace(float(sigmas[t]), float(sigmas[t + 1]), 20001, dtype=torch.float64)
    for current in range(order):
        basis = torch.ones_like(tau)
        for k in range(order):
            if k != current:
                basis = basis * (tau - sigmas[t - k]) / (sigmas[t - current] - sigmas[t - k])
        expected = torch.trapezoid(basis, tau).item()
        assert scheduler.get_lms_coefficient(order, t, current) == pytest.approx(expected, rel=1e-6)
    assert scheduler.get_lms_coefficient(1, 0, 0) == pytest.approx(float(sigmas[1] - sigmas[0]))


def test_refusals() -> None:
    with pytest.raises(UserError, match='unknown sampler "eulr".*did you mean "euler"'):
        check_sampler("eulr", v_prediction=False, zero_terminal_snr=False)
    with pytest.raises(UserError, match="v-prediction"):
        create_scheduler_for("ddim", v_prediction=False, zero_terminal_snr=True)
    for name in set(PUBLISHED) - set(ZERO_TERMINAL_SNR):
        with pytest.raises(UserError, match=f'"{name}" does not support it; use one of ddim'.replace("+", r"\+")):
            create_scheduler_for(name, v_prediction=True, zero_terminal_snr=True)
