"""The diffusion process on numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from library.diffusion.ddpm import NoiseSchedule, add_noise, enforce_zero_terminal_snr, velocity

#: alpha_bar 0.64: signal 0.8, noise 0.6
SCHEDULE = NoiseSchedule(torch.tensor([0.64, 0.36]))


def test_published_schedule() -> None:
    schedule = NoiseSchedule.scaled_linear()
    assert schedule.num_timesteps == 1000
    # beta_0 = 0.00085, so alpha_bar_0 = 0.99915; the last value is the well-known 0.00466
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.004660, abs=1e-5)


def test_equals_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    other = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = NoiseSchedule.scaled_linear()
    torch.testing.assert_close(schedule.alphas_cumprod, other.alphas_cumprod)
    x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(add_noise(schedule, x, noise, t), other.add_noise(x, noise, t))
    torch.testing.assert_close(velocity(schedule, x, noise, t), other.get_velocity(x, noise, t))


def test_by_hand() -> None:
    x, noise = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 5.0)
    t = torch.tensor([0, 1])
    # 0.8 * 10 + 0.6 * 5 = 11; 0.6 * 10 + 0.8 * 5 = 10
    torch.testing.assert_close(add_noise(SCHEDULE, x, noise, t).flatten(), torch.tensor([11.0, 10.0]))
    # 0.8 * 5 - 0.6 * 10 = -2; 0.6 * 5 - 0.8 * 10 = -5
    torch.testing.assert_close(velocity(SCHEDULE, x, noise, t).flatten(), torch.tensor([-2.0, -5.0]))
    # 0.64 / 0.36, 0.36 / 0.64
    torch.testing.assert_close(SCHEDULE.snr(), torch.tensor([16 / 9, 9 / 16]))


def test_half_precision_keeps_the_noise_of_the_first_timestep() -> None:
    # alpha_bar_0 = 0.99915 rounds to 1 in bfloat16, but the noise's share is sqrt(0.00085) = 0.0292
    zeros, ones = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    noisy = add_noise(NoiseSchedule.scaled_linear(), zeros, ones, torch.tensor([0]))
    assert noisy.dtype == torch.bfloat16
    assert noisy.item() == pytest.approx(0.0292, rel=0.01)


def test_zero_terminal_snr() -> None:
    # roots 0.8, 0.6, 0.4 -> (root - 0.4) * 0.8 / 0.4 -> 0.8, 0.4, 0
    found = enforce_zero_terminal_snr(torch.tensor([0.64, 0.36, 0.16]))
    torch.testing.assert_close(found, torch.tensor([0.64, 0.16, 0.0]))
    schedule = NoiseSchedule.scaled_linear(zero_terminal_snr=True)
    assert schedule.snr()[-1] == 0
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915)
