"""Gradual Latent: sizes, the step, and what it cannot work with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.feature_options.gradual_latent import read_unsharp
from library.inference.features.gradual_latent import GradualLatent, GrowingEulerAncestral, Growth
from library.inference.generate import generate_latents
from library.inference.models import GenerateOptions, ImageModels


def asked(settings: ImageSettings, **own: object) -> ImageSettings:
    own = {f"gradual_latent_{name}": value for name, value in own.items()}
    return replace(settings, sampler="euler_a", width=256, height=192, steps=8, own=own)


def test_latents_grow_from_step_to_step(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    sizes: list[tuple[int, ...]] = []
    models.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    one = asked(settings, timesteps=800, ratio=0.5, ratio_step=0.25, every_n_steps=2)
    found = generate_latents(models, [one], options, features=[GradualLatent()])
    assert found.shape == (1, 4, 24, 32) and torch.isfinite(found).all()
    # timesteps 999, 856, 714, ...: growth in the third step, and two steps later; sides are multiples of 8
    assert sizes == [(8, 16)] * 3 + [(16, 24)] * 2 + [(24, 32)] * 3


def test_too_few_steps_still_give_the_whole_size(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    one = asked(settings, timesteps=100, ratio=0.5)
    assert generate_latents(models, [one], options, features=[GradualLatent()]).shape == (1, 4, 24, 32)


def test_without_growth_the_step_is_that_of_diffusers(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings
) -> None:
    plain = generate_latents(models, [asked(settings)], options)
    found = generate_latents(models, [asked(settings, ratio=1.0)], options, features=[GradualLatent()])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_growth_is_behind_the_step_or_before_it(target: float, models: ImageModels) -> None:
    objective = models.architecture.objective(v_prediction=False, zero_terminal_snr=False)
    scheduler = objective.scheduler("euler_a", 4, (16, 16), torch.device("cpu"))
    growth = Growth((16, 16), below=2000, ratio=0.5, step=0.5, every=1, noise=0.0, unsharp=(3, 1.0, 0.0, target))
    growing = GrowingEulerAncestral.of(scheduler, growth)
    latents, output = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    found = growing.step(output, growing.timesteps[0], latents, generator=[torch.Generator()], return_dict=False)[0]
    sigma, following = scheduler.sigmas[:2]
    down = (following**2 - following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
    stepped = latents + output * (down - sigma)
    expected = torch.nn.functional.interpolate(stepped, (16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)  # resizing is linear, so both are equal


def test_an_unsharp_mask_keeps_flat_places() -> None:
    growth = Growth((8, 8), below=0, ratio=0.5, step=0.5, every=1, noise=1.0, unsharp=(3, 0.5, 0.5, 1))
    flat = torch.ones(1, 4, 8, 8)
    torch.testing.assert_close(growth.sharpened(flat), flat)
    edge = flat.clone()
    edge[..., 4:] = 2
    assert growth.sharpened(edge).max() > 2 and growth.sharpened(edge).min() < 1


def test_mistakes(models: ImageModels, options: GenerateOptions, settings: ImageSettings) -> None:
    with pytest.raises(UserError, match="sampler euler_a alone, not with ddim"):
        one = replace(asked(settings, timesteps=700), sampler="ddim")
        generate_latents(models, [one], options, features=[GradualLatent()])
    with pytest.raises(UserError, match="cannot be combined with a mask"):
        one = replace(asked(settings, timesteps=700), mask=Path("m.png"))
        generate_latents(models, [one], options, features=[GradualLatent()])
    for wrong in ("3,0.5", "2,0.5,0.5", "3,0,1", "a,b,c"):
        with pytest.raises(ValueError):
            read_unsharp(wrong)
    assert read_unsharp("3,0.5,0.5") == (3, 0.5, 0.5, 1)
