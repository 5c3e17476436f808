"""Rectified flow: paths, targets and losses worked by hand, weights and samplers against diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from library.diffusion.flow import FlowEuler, interpolate, resolution_shift, shift_sigma
from library.diffusion.objective import FlowObjective, LossSettings
from library.diffusion.weighting import WEIGHTING_SCHEMES, flow_weight
from library.randomness import torch_generator
from library.training.step import NoiseSettings, NoisyBatch, make_noisy, sample_losses

VISITS = [11, 12]
LATENTS = torch.full((2, 1, 4, 4), 10.0)
UNIFORM = FlowObjective(timestep_sampling="uniform")
#: the level of sigma 0.25 of the uniform density
QUARTER = 2500


def noise_of(purpose: str, shape: tuple[int, ...] = (1, 4, 4)) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch_generator(visit, purpose)) for visit in VISITS])


def made(prediction_type: str = "raw", level: int | None = QUARTER, **settings: object) -> NoisyBatch:
    objective = replace(UNIFORM, prediction_type=prediction_type)
    return make_noisy(LATENTS, VISITS, objective, NoiseSettings(**settings), level=level)


def test_the_path_goes_from_image_to_noise() -> None:
    found = interpolate(LATENTS[:1], torch.full((1, 1, 4, 4), -2.0), torch.tensor([0.25]))
    torch.testing.assert_close(found, torch.full_like(found, 0.75 * 10 - 0.25 * 2))
    # per sample, and in the latents' precision
    levels = torch.tensor([0.0, 1.0])
    low = interpolate(LATENTS.bfloat16(), -LATENTS.bfloat16(), levels)
    assert low.dtype == torch.bfloat16 and low[:, 0, 0, 0].tolist() == [10.0, -10.0]


def test_what_the_model_sees_and_answers() -> None:
    eps = noise_of("noise")
    found = made()
    torch.testing.assert_close(found.noisy, 7.5 + 0.25 * eps)
    torch.testing.assert_close(found.target, eps - 10.0)
    assert found.timesteps.tolist() == [250.0, 250.0]
    assert found.timesteps.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["raw", "additive", "sigma_scaled"])
def test_prediction_types_judge_the_same_model(prediction_type: str) -> None:
    """The loss of an output that stands for a velocity wrong by 2, at sigma 0.25: of v it is 4, of x_0 4 / 16."""
    eps = noise_of("noise")
    noisy = made(prediction_type)
    objective = replace(UNIFORM, prediction_type=prediction_type)
    wrong = eps - 10.0 + 2.0
    output = -0.25 * wrong if prediction_type == "additive" else wrong
    expected = 4.0 if prediction_type == "raw" else 0.25
    assert sample_losses(output, noisy, objective, LossSettings()).tolist() == pytest.approx([expected] * 2, rel=1e-4)
    # a sampler gets the velocity
    torch.testing.assert_close(objective.for_sampler(output, noisy.timesteps), wrong)
    # x_0 = x_t - sigma v = x_t + output of "additive"
    right = made("additive").target
    torch.testing.assert_close(noisy.noisy + right, LATENTS)


def test_noise_offset_and_multires_noise_are_learned() -> None:
    eps, offset = noise_of("noise"), noise_of("noise offset", (1, 1, 1))
    found = made(offset=0.1)
    torch.testing.assert_close(found.target, eps + 0.1 * offset - 10.0)
    torch.testing.assert_close(found.noisy, 7.5 + 0.25 * (eps + 0.1 * offset))
    pyramid = made(multires_iterations=3)
    torch.testing.assert_close(pyramid.noisy, 7.5 + 0.25 * (pyramid.target + 10.0))


@pytest.mark.parametrize("prediction_type", ["raw", "additive", "sigma_scaled"])
def test_input_perturbation_is_not_learned(prediction_type: str) -> None:
    eps, xi = noise_of("noise"), noise_of("ip noise")
    found = made(prediction_type, ip_gamma=0.1)
    torch.testing.assert_close(found.noisy, 7.5 + 0.25 * (eps + 0.1 * xi))
    assert torch.equal(found.target, made(prediction_type).target)
    strength = torch.stack([torch.rand(1, generator=torch_generator(v, "ip noise")) for v in VISITS])
    varied = made(prediction_type, ip_gamma=0.1, ip_gamma_random_strength=True).noisy - made(prediction_type).noisy
    assert (varied.abs().amax(dim=(1, 2, 3)) <= 0.25 * 0.1 * strength[:, 0] * 6).all()


# ---- losses ----


def losses(objective: FlowObjective = UNIFORM, masks: Tensor | None = None, **settings: object) -> list[float]:
    """Return the losses of an error of 2 in every element, at the timesteps 250 and 1000."""
    target = torch.ones(2, 1, 1, 2)
    noisy = NoisyBatch(torch.zeros_like(target), torch.tensor([250.0, 1000.0]), target)
    return sample_losses(target + 2.0, noisy, objective, LossSettings(**settings), masks=masks).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4.0, 4.0]),
        ({"loss_type": "l1"}, [2.0, 2.0]),
        ({"loss_type": "huber", "huber_schedule": "constant", "huber_c": 1.5}, [3.0, 3.0]),
        # noise to signal is 1/3 and infinite: 1 / (4/3)^2 = 9/16; c is 0.5 * 9/16 + 0.5 = 25/32, and 0.5
        (
            {"loss_type": "smooth_l1", "huber_schedule": "snr", "huber_c": 0.5},
            [2 * ((4 + (25 / 32) ** 2) ** 0.5 - 25 / 32), 2 * (4.25**0.5 - 0.5)],
        ),
        # c^sigma: 0.0001^(1/4) = 0.1, and 0.0001
        (
            {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.0001},
            [0.2 * (4.01**0.5 - 0.1), 0.0002 * (4 + 1e-8) ** 0.5 - 2e-8],
        ),
        # weights by SNR are not there, as the family's declaration says
        ({"min_snr_gamma": 5.0, "debiased": True, "v_pred_like_weight": 1.0}, [4.0, 4.0]),
    ],
)
def test_losses(settings: dict[str, object], expected: list[float]) -> None:
    assert losses(**settings) == pytest.approx(expected, rel=1e-5)


def test_weights_and_masks() -> None:
    # sigma^-2 is 16 and 1; half of the image counts
    masks = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    assert losses(replace(UNIFORM, weighting_scheme="sigma_sqrt"), masks=masks) == pytest.approx([32.0, 4.0])
    # 2 / (pi (1 - 0.5 + 0.125)) and 2 / pi
    cosmap = losses(replace(UNIFORM, weighting_scheme="cosmap"))
    assert cosmap == pytest.approx([4 * 2 / (math.pi * 0.625), 4 * 2 / math.pi])


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_weights_are_those_of_diffusers(scheme: str) -> None:
    sigmas = torch.linspace(0.001, 1.0, 500)
    torch.testing.assert_close(flow_weight(sigmas, scheme), compute_loss_weighting_for_sd3(scheme, sigmas))
    assert flow_weight(torch.zeros(3), scheme).isfinite().all()


# ---- sampling ----


def follow(scheduler: object, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
    latents = noise
    for timestep in scheduler.timesteps:
        velocity = model(latents, timestep)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def curved(latents: Tensor, timestep: Tensor) -> Tensor:
    """A velocity that depends on where and when."""
    return torch.tanh(latents) * 1.5 + timestep / 700 - latents.roll(1, -1)


NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("steps", [1, 4, 20, 27])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_euler_with_a_fixed_shift_is_that_of_diffusers(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    ours = FlowEuler(steps, shift)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(follow(ours, curved, NOISE), follow(theirs, curved, NOISE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (128, 128)])
def test_euler_with_the_shift_by_resolution_is_that_of_diffusers(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = size[0] * size[1] // 4
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=mu)
    ours = UNIFORM.scheduler("euler", 12, size, torch.device("cpu"))
    assert math.exp(mu) == pytest.approx(resolution_shift(tokens))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(follow(ours, curved, NOISE), follow(theirs, curved, NOISE), rtol=0, atol=2e-5)


def test_a_straight_path_is_drawn_exactly() -> None:
    image = torch.full_like(NOISE, 0.3)
    found = follow(FlowEuler(3, 2.0), lambda x, t: NOISE - image, NOISE)
    torch.testing.assert_close(found, image)


def test_shifts_multiply_and_undo() -> None:
    levels = torch.linspace(0.0, 1.0, 11)
    torch.testing.assert_close(shift_sigma(shift_sigma(levels, 3.0), 2.0), shift_sigma(levels, 6.0))
    torch.testing.assert_close(shift_sigma(shift_sigma(levels, 3.0), 1 / 3.0), levels)
    assert shift_sigma(levels, 3.0)[[0, -1]].tolist() == [0.0, 1.0]


def test_there_is_one_sampler() -> None:
    """Programs name a sampler for every model: an option that has no effect is no mistake."""
    for named, default in ((None, "ddim"), ("euler", "ddim"), (None, "euler_a"), ("k_dpm_2", "euler")):
        assert UNIFORM.sampler(named, default) == "euler"
