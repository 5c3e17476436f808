"""Losses and weights on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.architectures.sd import SD
from library.diffusion.ddpm import NoiseSchedule, add_noise, velocity
from library.diffusion.loss import conditional_loss, huber_threshold, masked
from library.diffusion.objective import LossSettings
from library.diffusion.weighting import debiased_weight, min_snr_weight, scale_v_pred_like_noise, v_pred_like_weight

#: alpha_bar 0.8 and 0.2: SNR 4 and 0.25; sigma 0.5 and 2
SCHEDULE = NoiseSchedule(torch.tensor([0.8, 0.2]))
T = torch.tensor([0, 1])


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).view(-1, 1, 1, 1)


def test_plain_losses() -> None:
    p, t = values(3.0, -1.0), values(1.0, 1.0)
    assert conditional_loss(p, t, "l2").flatten().tolist() == [4.0, 4.0]
    assert conditional_loss(p, t, "l1").flatten().tolist() == [2.0, 2.0]


def test_huber_and_smooth_l1() -> None:
    # difference 4, c 3: sqrt(16 + 9) - 3 = 2; huber 2 * 3 * 2 = 12, smooth_l1 2 * 2 = 4
    p, t, c = values(4.0), values(0.0), torch.tensor([3.0])
    assert conditional_loss(p, t, "huber", c).item() == pytest.approx(12.0)
    assert conditional_loss(p, t, "smooth_l1", c).item() == pytest.approx(4.0)
    # small differences: huber is the square
    small = conditional_loss(values(1e-2), t, "huber", c).item()
    assert small == pytest.approx(1e-4, rel=1e-3)
    # far below the threshold sqrt(d^2 + c^2) and c are one float32; the loss must not become 0
    assert conditional_loss(values(1e-4), t, "huber", c).item() == pytest.approx(1e-8, rel=1e-3)


def test_huber_has_a_gradient_at_zero() -> None:
    p = values(0.0, 3.0).requires_grad_()
    conditional_loss(p, values(0.0, 0.0), "huber", torch.tensor([4.0, 4.0])).sum().backward()
    # 2 c d / sqrt(d^2 + c^2): 0, and 2 * 4 * 3 / 5
    torch.testing.assert_close(p.grad.flatten(), torch.tensor([0.0, 4.8]))


def test_masks_weight_each_latent_pixel_by_the_mean_of_its_pixels() -> None:
    # 2x1 latent pixels of 2x2 pixels each: means (0 + 1 + 1 + 0) / 4 and (1 + 1 + 1 + 0.2) / 4
    mask = torch.tensor([[[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.2]]])
    loss = torch.tensor([[[[4.0, 10.0]], [[2.0, 100.0]]]])  # (1, 2, 1, 2)
    torch.testing.assert_close(masked(loss, mask), torch.tensor([[[[2.0, 8.0]], [[1.0, 80.0]]]]))
    assert masked(loss, None) is loss
    # each sample by its own mask, and W is not H
    two = masked(torch.ones(2, 1, 1, 2), torch.cat([mask, torch.zeros_like(mask)]))
    torch.testing.assert_close(two.flatten(), torch.tensor([0.5, 0.8, 0.0, 0.0]))


def test_what_is_masked_out_has_no_gradient() -> None:
    p = torch.zeros(1, 1, 1, 2, requires_grad=True)
    mask = torch.tensor([[[0.0, 0.5]]])
    masked(conditional_loss(p, torch.ones(1, 1, 1, 2), "l2"), mask).mean().backward()
    # d/dp of 0.5 (p - 1)^2 / 2 elements at p = 0
    assert p.grad.flatten().tolist() == [0.0, -0.5]


def test_unknown_names_and_missing_threshold() -> None:
    with pytest.raises(ValueError, match="unknown loss type"):
        conditional_loss(values(1.0), values(1.0), "l3")
    with pytest.raises(ValueError, match="needs huber_c"):
        conditional_loss(values(1.0), values(1.0), "huber")
    with pytest.raises(ValueError, match="unknown huber schedule"):
        huber_threshold(T, SCHEDULE, "linear", 0.1, 1.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.1, 0.1]),
        # T = 2 steps: exp(0) and exp(ln(0.1) / 2) = sqrt(0.1)
        ("exponential", [1.0, math.sqrt(0.1)]),
        # 0.9 / 1.5^2 + 0.1 = 0.5; 0.9 / 3^2 + 0.1 = 0.2
        ("snr", [0.5, 0.2]),
    ],
)
def test_thresholds(name: str, expected: list[float]) -> None:
    torch.testing.assert_close(huber_threshold(T, SCHEDULE, name, 0.1, 1.0), torch.tensor(expected))
    doubled = [2 * value for value in expected]
    torch.testing.assert_close(huber_threshold(T, SCHEDULE, name, 0.1, 2.0), torch.tensor(doubled))


def test_min_snr() -> None:
    # SNR 4 and 0.25, gamma 1: 1/4 and 0.25/0.25; for v 1/5 and 0.25/1.25
    torch.testing.assert_close(min_snr_weight(T, SCHEDULE, 1.0, False), torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(min_snr_weight(T, SCHEDULE, 1.0, True), torch.tensor([0.2, 0.2]))


def test_v_prediction_scales() -> None:
    # SNR / (SNR + 1) is alpha_bar
    torch.testing.assert_close(scale_v_pred_like_noise(T, SCHEDULE), torch.tensor([0.8, 0.2]))
    # 1 + 0.5 / 0.8 and 1 + 0.5 / 0.2
    torch.testing.assert_close(v_pred_like_weight(T, SCHEDULE, 0.5), torch.tensor([1.625, 3.5]))


def test_debiased() -> None:
    # 1 / sqrt(4) and 1 / sqrt(0.25); for v 1/5 and 1/1.25
    torch.testing.assert_close(debiased_weight(T, SCHEDULE, False), torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(debiased_weight(T, SCHEDULE, True), torch.tensor([0.2, 0.8]))


def test_the_scale_turns_v_loss_into_noise_loss() -> None:
    """For one x_t: an error of v times alpha_bar's root is one of eps, so losses differ by alpha_bar."""
    alpha = SCHEDULE.alphas_cumprod
    error_of_noise = torch.tensor([0.3, 0.3])
    error_of_v = error_of_noise / alpha.sqrt()
    torch.testing.assert_close(error_of_v.square() * scale_v_pred_like_noise(T, SCHEDULE), error_of_noise.square())


def test_the_debiased_weight_of_v_makes_timesteps_count_alike_in_x0() -> None:
    """For one x_t, v = (sqrt(alpha_bar) x_t - x_0) / sqrt(1 - alpha_bar)."""
    error_of_x0 = torch.tensor([0.3, 0.3])
    error_of_v = error_of_x0 / (1 - SCHEDULE.alphas_cumprod).sqrt()
    torch.testing.assert_close(error_of_v.square() * debiased_weight(T, SCHEDULE, True), error_of_x0.square())


def test_the_debiased_weight_stops_falling_at_an_snr_of_1000() -> None:
    # alpha_bar 0.9999: SNR 9999
    schedule = NoiseSchedule(torch.tensor([0.9999]))
    first = torch.tensor([0])
    assert debiased_weight(first, schedule, False).item() == pytest.approx(1000**-0.5)
    assert debiased_weight(first, schedule, True).item() == pytest.approx(1 / 1001)


def test_zero_terminal_snr_stays_finite() -> None:
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    last = torch.tensor([999])
    # the limits for an SNR of 0, and 0.9 / (1 + infinity) + 0.1
    assert min_snr_weight(last, schedule, 5.0, False).item() == 1
    assert min_snr_weight(last, schedule, 5.0, True).item() == 0
    assert debiased_weight(last, schedule, True).item() == 1
    assert huber_threshold(last, schedule, "snr", 0.1, 1.0).item() == pytest.approx(0.1)
    # no larger than where the plain schedule ends, at an SNR of 0.0047
    for t in (last, torch.tensor([998]), torch.tensor([900])):
        assert debiased_weight(t, schedule, False).item() <= 0.004**-0.5 + 1e-4
        assert v_pred_like_weight(t, schedule, 0.5).item() <= 1 + 0.5 * 251 + 1e-3


def test_caps_for_zero_terminal_snr_leave_the_plain_schedule_as_it_is() -> None:
    schedule = NoiseSchedule.scaled_linear()
    every, snr = torch.arange(1000), schedule.snr()
    assert torch.equal(debiased_weight(every, schedule, False), 1 / snr.clamp(max=1000).sqrt())
    assert torch.equal(v_pred_like_weight(every, schedule, 0.5), 1 + 0.5 / (snr / (snr + 1)))


def test_no_value_is_read_back() -> None:
    """Fake tensors have no values: reading one, which would wait for the device, raises."""
    with FakeTensorMode():
        schedule, t = NoiseSchedule(torch.rand(1000)), torch.zeros(2, dtype=torch.long)
        x, noise = torch.rand(2, 4, 8, 8), torch.rand(2, 4, 8, 8)
        with pytest.raises(RuntimeError):
            x.mean().item()
        noisy, target = add_noise(schedule, x, noise, t), velocity(schedule, x, noise, t)
        for kind in ("constant", "exponential", "snr"):
            c = huber_threshold(t, schedule, kind, 0.1, 1.0)
            assert conditional_loss(noisy, target, "smooth_l1", c).shape == x.shape
        for v_prediction in (False, True):
            assert min_snr_weight(t, schedule, 5.0, v_prediction).shape == (2,)
            assert debiased_weight(t, schedule, v_prediction).shape == (2,)
        assert scale_v_pred_like_noise(t, schedule).shape == v_pred_like_weight(t, schedule, 0.5).shape == (2,)


def test_weights_by_snr_know_the_schedule_that_ends_in_noise() -> None:
    """The schedule is diffusers'; the ratios of the schedule before would be others."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod[:999]
    snr = theirs / (1 - theirs)
    at = torch.arange(999)
    ours = SD.objective(v_prediction=True, zero_terminal_snr=True).weighted(
        torch.ones(999), at, LossSettings(min_snr_gamma=5.0)
    )
    torch.testing.assert_close(ours, snr.clamp(max=5.0) / (snr + 1), rtol=1e-3, atol=1e-6)
    old = SD.objective(v_prediction=True, zero_terminal_snr=False).weighted(
        torch.ones(999), at, LossSettings(min_snr_gamma=5.0)
    )
    assert (old[-1] / ours[-1]) > 10
