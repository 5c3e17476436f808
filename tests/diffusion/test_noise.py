"""Noise variants: their spread, their formulas, and that a sample's noise does not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from library.diffusion.noise import draw_noise, offset_noise, perturb_input, pyramid_noise
from library.diffusion.timesteps import sample_timestep

SHAPE = (4, 8, 8)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


VARIANTS = {
    "plain": lambda noise, latents, seeds: draw_noise(SHAPE, generators(*seeds)),
    "offset": lambda noise, latents, seeds: offset_noise(noise, latents, generators(*seeds), offset=0.1),
    "random offset": lambda noise, latents, seeds: offset_noise(
        noise, latents, generators(*seeds), offset=0.1, random_strength=True
    ),
    "adaptive offset": lambda noise, latents, seeds: offset_noise(
        noise, latents, generators(*seeds), offset=0.1, adaptive_scale=0.2
    ),
    "pyramid": lambda noise, latents, seeds: pyramid_noise(noise, generators(*seeds), iterations=4, discount=0.3),
    "input": lambda noise, latents, seeds: perturb_input(noise, generators(*seeds), gamma=0.1),
    "random input": lambda noise, latents, seeds: perturb_input(
        noise, generators(*seeds), gamma=0.1, random_strength=True
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    noise, latents = draw_noise(SHAPE, generators(1, 2)), torch.randn(2, *SHAPE)
    both = VARIANTS[name](noise, latents, (3, 4))
    second = VARIANTS[name](noise[1:], latents[1:], (4,))
    assert torch.equal(both[1:], second)
    assert not torch.equal(both[0], both[1])


def test_offset_is_one_number_per_channel() -> None:
    noise = torch.zeros(1, *SHAPE)
    made = offset_noise(noise, noise, generators(5), offset=0.5)
    per_channel = torch.randn(4, 1, 1, generator=generators(5)[0]) * 0.5
    torch.testing.assert_close(made, per_channel.expand(SHAPE).unsqueeze(0))


def test_adaptive_offset_adds_the_channels_mean() -> None:
    noise = torch.zeros(1, 2, 1, 1)
    latents = torch.tensor([2.0, -4.0]).view(1, 2, 1, 1)
    drawn = torch.randn(2, 1, 1, generator=generators(6)[0])
    made = offset_noise(noise, latents, generators(6), offset=0.1, adaptive_scale=0.05)
    # 0.1 + 2 * 0.05 = 0.2; 0.1 + 4 * 0.05 = 0.3
    torch.testing.assert_close(made[0], drawn * torch.tensor([0.2, 0.3]).view(2, 1, 1))
    # 0.1 - 2 * 0.2 < 0, so nothing is added
    none = offset_noise(noise, latents, generators(6), offset=0.1, adaptive_scale=-0.2)
    assert torch.equal(none, noise)


def test_random_strength_scales_the_whole_offset() -> None:
    noise = torch.zeros(1, *SHAPE)
    generator = generators(7)[0]
    strength = torch.rand(1, generator=generator)
    expected = strength * 0.5 * torch.randn(4, 1, 1, generator=generator)
    made = offset_noise(noise, noise, generators(7), offset=0.5, random_strength=True)
    torch.testing.assert_close(made[0], expected.expand(SHAPE))


def test_pyramid_layers_have_the_published_sizes() -> None:
    """Those of the full size divided by r ** i, not of the layer before."""
    noise = draw_noise((1, 64, 64), generators(12))
    generator = generators(13)[0]
    # layer 0 is of full size whatever r is; layers 1 and 2 divide the sides by r and by r^2
    torch.rand(1, generator=generator)
    expected = noise + torch.randn(1, 1, 64, 64, generator=generator)
    for layer in (1, 2):
        side = int(64 / float(torch.rand(1, generator=generator) * 2 + 2) ** layer)
        coarse = torch.randn(1, 1, side, side, generator=generator)
        expected += functional.interpolate(coarse, size=(64, 64), mode="bilinear") * 0.5**layer
    assert 64 / 16 <= side <= 64 / 4
    made = pyramid_noise(noise, generators(13), iterations=3, discount=0.5)
    torch.testing.assert_close(made, expected / expected.std())


def test_pyramid_noise_has_unit_spread_and_is_smoother() -> None:
    noise = draw_noise((4, 32, 32), generators(8))
    made = pyramid_noise(noise, generators(9), iterations=6, discount=0.8)
    assert made.std().item() == pytest.approx(1.0, abs=1e-5)

    def roughness(t: torch.Tensor) -> float:
        return float((t[..., 1:] - t[..., :-1]).square().mean())

    assert roughness(made) < 0.9 * roughness(noise)


def test_input_noise_adds_variance() -> None:
    noise = draw_noise((4, 64, 64), generators(10))
    made = perturb_input(noise, generators(11), gamma=0.5)
    # independent: 1 + 0.25
    assert made.var().item() == pytest.approx(1.25, rel=0.05)
    scaled = perturb_input(torch.zeros_like(noise), generators(11), gamma=0.5, random_strength=True)
    # one factor below 0.5 for the whole sample
    assert 0 < scaled.std().item() < 0.5


def test_timesteps_stay_in_their_range_and_are_even() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_timestep(generator, 3, 6) for _ in range(600)]
    # 200 each, with a standard deviation of sqrt(600 * 1/3 * 2/3) = 11.5
    assert set(drawn) == {3, 4, 5}
    assert all(abs(drawn.count(t) - 200) < 50 for t in (3, 4, 5))
    with pytest.raises(ValueError, match="no timestep"):
        sample_timestep(generator, 5, 5)
