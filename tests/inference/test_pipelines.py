"""SD 2.x and SDXL generate what diffusers' pipelines generate from the same noise, with every sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.common.latent_diffusion import LatentDiffusion
from library.architectures.sd import SD
from library.architectures.sdxl import SDXL
from library.config.image_settings import ImageSettings
from library.diffusion.samplers import SAMPLER_NAMES, create_scheduler_for
from library.inference.control_models import ControlModel
from library.inference.features.control_net import ControlNets
from library.inference.features.image_to_image import ImageToImage
from library.inference.generate import generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.fixtures.control import random_controlnet
from tests.fixtures.tiny_sd import make_tiny_sd
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

#: each class of scheduler once
SAMPLERS = [name for name in SAMPLER_NAMES if not name.startswith("k_")]
SOURCE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Pair:
    """Our models, and diffusers' pipeline with the same weights."""

    models: ImageModels
    pipeline: Any


def loaded(family: LatentDiffusion, made: Any, **flags: bool) -> ImageModels:
    given = {"v2": False, "v_parameterization": False, **flags}
    checkpoint = family.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir), **given)
    return ImageModels(
        architecture=family,
        tokenizers=family.load_tokenizers(checkpoint),
        text_encoders=family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu"),
        denoiser=family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
        vae=family.load_vae(checkpoint, dtype=torch.float32, device="cpu"),
        v_prediction=checkpoint.info.v_prediction,
    )


@pytest.fixture(scope="module", params=["sd2", "sd2 v", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    import diffusers

    folder = tmp_path_factory.mktemp("pair") / "model"
    if request.param == "sdxl":
        made = make_tiny_sdxl(folder, layout="diffusers")
        models = loaded(SDXL, made)
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(made.path, add_watermarker=False)
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    else:
        v = request.param == "sd2 v"
        made = make_tiny_sd(folder, layout="diffusers", v2=True, v_prediction=v)
        models = loaded(SD, made, v2=True, v_parameterization=v)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(made.path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return Pair(models, pipeline)


def of_diffusers(pipeline: Any, models: ImageModels, settings: ImageSettings, **more: object) -> Tensor:
    pipeline.scheduler = create_scheduler_for(settings.sampler, v_prediction=models.v_prediction)
    return pipeline(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.scale,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="latent",
        **more,
    ).images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_text(pair: Pair, options: GenerateOptions, settings: ImageSettings, sampler: str) -> None:
    settings = replace(settings, sampler=sampler, steps=4)
    expected = of_diffusers(pair.pipeline, pair.models, settings, width=64, height=64)
    found = generate_latents(pair.models, [settings], options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pair", ["sdxl"], indirect=True)
@pytest.mark.parametrize("second", ["red dog", "cat " * 80, ""])
def test_a_prompt_for_each_text_encoder(
    pair: Pair, options: GenerateOptions, settings: ImageSettings, second: str
) -> None:
    expected = of_diffusers(pair.pipeline, pair.models, settings, width=64, height=64, prompt_2=second)
    plain = generate_latents(pair.models, [settings], options)
    found = generate_latents(pair.models, [replace(settings, own={"prompt2": second})], options)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(found, plain) == (second == "")


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_from_an_image(pair: Pair, options: GenerateOptions, settings: ImageSettings, sampler: str) -> None:
    import diffusers

    settings = replace(settings, sampler=sampler, steps=5, strength=0.6)
    parts = dict(pair.pipeline.components)
    if "text_encoder_2" in parts:
        parts.pop("image_encoder"), parts.pop("feature_extractor")
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
            **parts, force_zeros_for_empty_prompt=False, add_watermarker=False
        )
    else:
        pipeline = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    more = {"original_size": (64, 64), "target_size": (64, 64)} if "text_encoder_2" in parts else {}
    expected = of_diffusers(pipeline, pair.models, settings, image=SOURCE, strength=0.6, **more)
    found = generate_latents(pair.models, [settings], options, features=[ImageToImage(SOURCE)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "sampler", [pytest.param(n, marks=[] if n in ("ddim", "heun") else [pytest.mark.slow]) for n in SAMPLERS]
)
def test_with_a_controlnet(
    pair: Pair,
    options: GenerateOptions,
    settings: ImageSettings,
    hint: Path,
    sampler: str,
) -> None:
    import diffusers
    from PIL import Image

    settings = replace(settings, sampler=sampler, control=(hint,))
    net, parts = random_controlnet(pair.models.denoiser), dict(pair.pipeline.components)
    if "text_encoder_2" in parts:
        parts.pop("image_encoder"), parts.pop("feature_extractor")
        pipeline = diffusers.StableDiffusionXLControlNetPipeline(
            **parts, controlnet=net, force_zeros_for_empty_prompt=False, add_watermarker=False
        )
    else:
        pipeline = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    more = {"controlnet_conditioning_scale": 0.8, "width": 64, "height": 64}
    expected = of_diffusers(pipeline, pair.models, settings, image=Image.open(hint), **more)
    models = replace(pair.models, of_features={ControlNets: [ControlModel(net, weight=0.8)]})
    found = generate_latents(models, [settings], options, features=[ControlNets()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
