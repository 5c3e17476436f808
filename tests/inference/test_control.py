"""ControlNets and ControlNet-LLLites while images are generated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.config.image_settings import ImageSettings
from library.inference.control_models import ControlModel, edges
from library.inference.features.control_net import ControlNets
from library.inference.features.deep_shrink import DeepShrink
from library.inference.generate import generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.fixtures.control import random_controlnet
from tests.fixtures.tiny_sd import MadeCheckpoint


def latents(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, *nets: ControlModel, features: tuple = ()
) -> torch.Tensor:
    models = replace(models, of_features={ControlNets: nets})
    return generate_latents(models, [settings], options, features=[*(f() for f in features), ControlNets()])


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_same_as_diffusers_pipeline(
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    folder: MadeCheckpoint,
    hint: Path,
    sampler: str,
) -> None:
    from diffusers import StableDiffusionControlNetPipeline

    net = random_controlnet(models.denoiser)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder.path, controlnet=net, safety_checker=None, requires_safety_checker=False
    )
    settings = replace(settings, control=(hint,), sampler=sampler, steps=4)
    pipeline.scheduler = models.architecture.objective(v_prediction=False, zero_terminal_snr=False).scheduler(
        sampler, 4, (8, 8), torch.device("cpu")
    )
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(settings.seed))
    expected = pipeline(
        settings.prompt,
        image=Image.open(hint),
        negative_prompt=settings.negative_prompt,
        num_inference_steps=4,
        guidance_scale=settings.scale,
        latents=noise,
        controlnet_conditioning_scale=0.7,
        height=64,
        width=64,
        output_type="latent",
    ).images
    found = latents(models, options, settings, ControlModel(net, weight=0.7))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - latents(models, options, settings)).abs().max() > 0.01


def test_weight_and_share_of_the_steps(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, hint: Path
) -> None:
    settings = replace(settings, control=(hint,), steps=4)
    net = random_controlnet(models.denoiser)
    plain, full = latents(models, options, settings), latents(models, options, settings, ControlModel(net))
    assert torch.equal(latents(models, options, settings, ControlModel(net, weight=0.0)), plain)
    calls: list[int] = []
    net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    half = latents(models, options, settings, ControlModel(net, until=0.5))
    assert calls == [2, 2, 2]  # steps 0, 1 and 2 of 4, with and without the prompt
    assert not torch.equal(half, full) and not torch.equal(half, plain)


def test_several_take_turns(models: ImageModels, options: GenerateOptions, settings: ImageSettings, hint: Path) -> None:
    settings = replace(settings, control=(hint, hint), steps=4)
    nets = [random_controlnet(models.denoiser, seed) for seed in range(2)]
    order: list[int] = []
    for number, net in enumerate(nets):
        net.register_forward_pre_hook(lambda module, args, number=number: order.append(number))
    latents(models, options, settings, *map(ControlModel, nets))
    assert order == [0, 1, 0, 1]


@pytest.mark.parametrize("depth", [0, 1])
def test_deep_shrink_shrinks_the_controlnet_too(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, hint: Path, depth: int
) -> None:
    settings = replace(settings, control=(hint,), width=128, height=128, own={"ds_depth_1": depth, "ds_timesteps_1": 0})
    net = random_controlnet(models.denoiser)
    found = latents(models, options, settings, ControlModel(net), features=(DeepShrink,))
    assert found.shape == (1, 4, 16, 16)
    assert not torch.equal(found, latents(models, options, settings, features=(DeepShrink,)))


def test_edges_are_those_of_a_square() -> None:
    pixels = torch.full((3, 32, 32), -1.0)
    pixels[:, 8:24, 8:24] = 1.0
    found = edges(pixels, 63, 191)
    assert found.shape == (3, 32, 32) and set(found.unique().tolist()) == {-1.0, 1.0}
    assert (found[0, 12:20, 12:20] == -1).all() and (found[0, 12, 6:10] == 1).any()
