"""From latents to a loss, on numbers worked by hand: what is drawn, what is asked for, and how errors are weighed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from library.diffusion import noise as noises
from library.diffusion.ddpm import NoiseSchedule
from library.diffusion.objective import DdpmObjective, LossSettings
from library.randomness import torch_generator
from library.training.batch_losses import BatchLosses
from library.training.step import NoiseSettings, NoisyBatch, make_noisy, sample_losses

#: alpha_bar 0.64, 0.36 and 0: signal 0.8, 0.6 and 0, noise 0.6, 0.8 and 1, SNR 16/9, 9/16 and 0
SCHEDULE = NoiseSchedule(torch.tensor([0.64, 0.36, 0.0]))
VISITS = [11, 12]
LATENTS = torch.full((2, 1, 4, 4), 10.0)


def noise_of(purpose: str, shape: tuple[int, ...] = (1, 4, 4)) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=torch_generator(visit, purpose)) for visit in VISITS])


def made(timestep: int | None = 0, *, v_prediction: bool = False, **settings: object) -> NoisyBatch:
    given = {"max_timestep": 3, **settings}
    return make_noisy(LATENTS, VISITS, DdpmObjective(SCHEDULE, v_prediction), NoiseSettings(**given), level=timestep)


def test_noise_prediction_and_v_prediction() -> None:
    eps = noise_of("noise")
    plain, v = made(1), made(1, v_prediction=True)
    torch.testing.assert_close(plain.noisy, 6.0 + 0.8 * eps)
    assert torch.equal(plain.target, eps)
    assert torch.equal(v.noisy, plain.noisy)
    torch.testing.assert_close(v.target, 0.6 * eps - 8.0)


def test_at_zero_terminal_snr_nothing_of_the_image_is_left() -> None:
    eps = noise_of("noise")
    last = made(2, v_prediction=True)
    assert torch.equal(last.noisy, eps)
    torch.testing.assert_close(last.target, torch.full_like(eps, -10.0))


def test_offset_noise_is_learned_too() -> None:
    """It is part of the noise: of the input and of the target."""
    eps, offset = noise_of("noise"), noise_of("noise offset", (1, 1, 1))
    found = made(0, offset=0.1)
    torch.testing.assert_close(found.target, eps + 0.1 * offset)
    torch.testing.assert_close(found.noisy, 8.0 + 0.6 * (eps + 0.1 * offset))
    # 0.1 + |10| * 0.02 = 0.3
    torch.testing.assert_close(made(0, offset=0.1, adaptive_scale=0.02).target, eps + 0.3 * offset)


def test_random_strength_of_the_offset_is_each_samples_own() -> None:
    eps = noise_of("noise")
    added = made(0, offset=0.1, offset_random_strength=True).target - eps
    for row, visit in enumerate(VISITS):
        generator = torch_generator(visit, "noise offset")
        strength = torch.rand(1, generator=generator)
        expected = 0.1 * strength * torch.randn(1, 1, 1, generator=generator)
        torch.testing.assert_close(added[row], expected.expand(1, 4, 4))


@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (3, 0.5)])
def test_multires_noise_has_unit_spread_and_is_what_is_learned(iterations: int, discount: float) -> None:
    found = made(0, multires_iterations=iterations, multires_discount=discount)
    torch.testing.assert_close(found.noisy, 8.0 + 0.6 * found.target)
    torch.testing.assert_close(found.target.std(dim=(1, 2, 3)), torch.ones(2))
    generators = [torch_generator(visit, "multires noise") for visit in VISITS]
    torch.testing.assert_close(
        found.target, noises.pyramid_noise(noise_of("noise"), generators, iterations=iterations, discount=discount)
    )


def test_multires_noise_comes_after_the_offset() -> None:
    """As published: the offset is scaled back to unit spread with the rest."""
    found = made(0, multires_iterations=3, multires_discount=0.5, offset=0.5)
    with_offset = made(0, offset=0.5).target
    generators = [torch_generator(visit, "multires noise") for visit in VISITS]
    expected = noises.pyramid_noise(with_offset, generators, iterations=3, discount=0.5)
    torch.testing.assert_close(found.target, expected)
    torch.testing.assert_close(found.target.std(dim=(1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize("v_prediction", [False, True])
def test_input_perturbation_is_not_learned(v_prediction: bool) -> None:
    """Ning et al. 2023 (arXiv:2301.11706), algorithm 1: the network sees eps + gamma xi and answers eps."""
    eps, xi = noise_of("noise"), noise_of("ip noise")
    found = made(1, ip_gamma=0.1, v_prediction=v_prediction)
    torch.testing.assert_close(found.noisy, 6.0 + 0.8 * (eps + 0.1 * xi))
    torch.testing.assert_close(found.target, 0.6 * eps - 8.0 if v_prediction else eps)
    assert torch.equal(found.target, made(1, v_prediction=v_prediction).target)


def test_random_strength_of_the_input_perturbation() -> None:
    found = made(1, ip_gamma=0.5, ip_gamma_random_strength=True)
    eps = noise_of("noise")
    for row, visit in enumerate(VISITS):
        generator = torch_generator(visit, "ip noise")
        gamma = 0.5 * torch.rand(1, generator=generator)
        xi = torch.randn(1, 4, 4, generator=generator)
        torch.testing.assert_close(found.noisy[row], 6.0 + 0.8 * (eps[row] + gamma * xi))


def test_timesteps_come_from_the_range() -> None:
    latents = torch.zeros(400, 1, 1, 1)
    schedule = NoiseSchedule.scaled_linear()
    settings = NoiseSettings(min_timestep=700, max_timestep=703)
    found = make_noisy(latents, list(range(400)), DdpmObjective(schedule), settings).timesteps
    assert set(found.tolist()) == {700, 701, 702}  # the end is not one of them


# ---- losses ----


def losses(*, v_prediction: bool = False, masks: torch.Tensor | None = None, **settings: object) -> list[float]:
    """Return the losses of an error of 2 in every element, at the timesteps 0 and 1."""
    target = torch.ones(2, 1, 1, 2)
    noisy = NoisyBatch(torch.zeros_like(target), torch.tensor([0, 1]), target)
    given = LossSettings(**settings)
    return sample_losses(target + 2.0, noisy, DdpmObjective(SCHEDULE, v_prediction), given, masks=masks).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4.0, 4.0]),
        ({"loss_type": "l1"}, [2.0, 2.0]),
        # c = 1.5: sqrt(4 + 2.25) - 1.5 = 1; huber 2 * 1.5 * 1, smooth_l1 2 * 1
        ({"loss_type": "huber", "huber_schedule": "constant", "huber_c": 1.5}, [3.0, 3.0]),
        ({"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 1.5}, [2.0, 2.0]),
        ({"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.5, "huber_scale": 3.0}, [3.0, 3.0]),
        # sigma is 0.75 and 4/3, so 1 / (1 + sigma)^2 is 16/49 and 9/49; c is 0.5 * that + 0.5, doubled: 65/49 and 58/49
        (
            {"loss_type": "smooth_l1", "huber_schedule": "snr", "huber_c": 0.5, "huber_scale": 2.0},
            [2 * ((4 + (65 / 49) ** 2) ** 0.5 - 65 / 49), 2 * ((4 + (58 / 49) ** 2) ** 0.5 - 58 / 49)],
        ),
        # c is 1 at t = 0 and 0.001^(1/3) = 0.1 at t = 1 of 3
        (
            {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.001},
            [2 * (5**0.5 - 1), 2 * 0.1 * (4.01**0.5 - 0.1)],
        ),
        # min(16/9, 1) / (16/9) and 1
        ({"min_snr_gamma": 1.0}, [4 * 9 / 16, 4.0]),
        # 1 / sqrt(SNR)
        ({"debiased": True}, [4 * 3 / 4, 4 * 4 / 3]),
        # 1 + 0.5 / alpha_bar
        ({"v_pred_like_weight": 0.5}, [4 * 1.78125, 4 * (1 + 0.5 / 0.36)]),
        # weights multiply
        ({"loss_type": "l1", "min_snr_gamma": 1.0, "debiased": True}, [2 * 9 / 16 * 3 / 4, 2 * 4 / 3]),
    ],
)
def test_losses_of_noise_prediction(settings: dict[str, object], expected: list[float]) -> None:
    assert losses(**settings) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4.0, 4.0]),
        # min(SNR, 1) / (SNR + 1): 1 / (25/9) and (9/16) / (25/16)
        ({"min_snr_gamma": 1.0}, [4 * 0.36, 4 * 0.36]),
        # alpha_bar
        ({"scale_v_pred_like_noise_pred": True}, [4 * 0.64, 4 * 0.36]),
        # 1 / (SNR + 1) = 1 - alpha_bar
        ({"debiased": True}, [4 * 0.36, 4 * 0.64]),
    ],
)
def test_losses_of_v_prediction(settings: dict[str, object], expected: list[float]) -> None:
    assert losses(v_prediction=True, **settings) == pytest.approx(expected, rel=1e-5)


def test_a_masked_sample_counts_by_the_share_that_is_learned() -> None:
    # the left half in full and a quarter of the right one; nothing of the second image
    masks = torch.tensor([[[1.0, 1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    assert losses(masks=masks) == pytest.approx([4 * (1 + 0.25) / 2, 0.0])
    assert losses(masks=masks, min_snr_gamma=1.0) == pytest.approx([2.5 * 9 / 16, 0.0])


def test_low_precision_predictions_are_compared_in_float32() -> None:
    target = torch.full((1, 1, 1, 1), 100.0)
    noisy = NoisyBatch(target, torch.tensor([0]), target)
    prediction = torch.full((1, 1, 1, 1), 400.0, dtype=torch.float16)
    # 300^2 = 90000 is more than float16 has
    assert sample_losses(prediction, noisy, DdpmObjective(SCHEDULE), LossSettings()).tolist() == [90000.0]


def test_the_mean_of_a_batch_weighs_regularization_images(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = BatchLosses(
        *(None,) * 5,  # type: ignore[arg-type]
        noise=NoiseSettings(),
        loss=LossSettings(),
        dtype=torch.float32,
        autocast=nullcontext,
        activations=nullcontext,
    )
    monkeypatch.setattr(losses, "encode", lambda batch: (None, None))
    monkeypatch.setattr(losses, "at", lambda *_, **more: torch.tensor([4.0, 2.0]))
    batch = SimpleNamespace(loss_weights=torch.tensor([1.0, 0.5]), visits=[1, 2])  # --prior_loss_weight 0.5
    # (4 + 0.5 * 2) / 2 images
    assert losses(batch).mean().item() == 2.5  # type: ignore[arg-type]
