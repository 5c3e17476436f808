"""The size conditioning of SDXL: equal to diffusers' pipeline, beside the prompt and the negative prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.architectures.sdxl import SDXL
from library.config.image_settings import ImageSettings
from library.diffusion.samplers import create_scheduler_for
from library.inference.generate import generate_latents
from library.inference.highres_fix import HighresFix
from library.inference.models import GenerateOptions, ImageModels
from tests.fixtures.tiny_sdxl import make_tiny_sdxl

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GIVEN = {
    "original_height": 300, "original_width": 200, "original_height_negative": 90, "original_width_negative": 80,
    "crop_top": 12, "crop_left": 34,
}  # fmt: skip


@pytest.mark.parametrize("given", [{}, GIVEN, {"original_height": 300, "original_width": 200}])
def test_as_diffusers(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, int], options: GenerateOptions
) -> None:
    import diffusers

    made = make_tiny_sdxl(tmp_path_factory.mktemp("xl") / "model", layout="diffusers")
    checkpoint = SDXL.inspect(
        str(made.path), v2=False, v_parameterization=False, vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir)
    )
    models = ImageModels(
        architecture=SDXL,
        tokenizers=SDXL.load_tokenizers(checkpoint),
        text_encoders=SDXL.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu"),
        denoiser=SDXL.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
    )
    settings = ImageSettings("a photo of the cat", "dog", 64, 96, steps=3, scale=5.0, sampler="ddim", seed=7, **given)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(made.path, add_watermarker=False)
    pipeline.scheduler = create_scheduler_for("ddim", v_prediction=False)
    pipeline.set_progress_bar_config(disable=True)
    original = (given.get("original_height", 96), given.get("original_width", 64))  # diffusers takes (height, width)
    crop = (given.get("crop_top", 0), given.get("crop_left", 0))
    expected = pipeline(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        width=64,
        height=96,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        original_size=original,
        crops_coords_top_left=crop,
        target_size=(96, 64),
        negative_original_size=(
            given.get("original_height_negative", original[0]),
            given.get("original_width_negative", original[1]),
        ),
        negative_crops_coords_top_left=crop,
        negative_target_size=(96, 64),
    ).images
    torch.testing.assert_close(generate_latents(models, [settings], options), expected, rtol=0, atol=1e-4)
    assert {name: text for name, text in settings.record(model="m").items() if name in GIVEN} == {
        name: str(value) for name, value in given.items()
    }


def test_sizes_shrink_with_the_first_stage(settings: ImageSettings) -> None:
    first = HighresFix(0.5).first(replace(settings, width=128, height=128, original_height=301, crop_top=11))
    assert (first.original_height, first.original_width, first.crop_top) == (151, None, 6)
