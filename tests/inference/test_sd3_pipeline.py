"""Whole sampling of Stable Diffusion 3 equals diffusers' pipeline, from the same weights, texts and noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from library.architectures.sd3 import SD3
from library.architectures.sd3.options import SD3Options
from library.config.image_settings import ImageSettings
from library.inference.generate import decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.architectures.sd3.test_model import theirs as diffusers_transformer
from tests.fixtures.tiny_sd3 import MODELS, make_tiny_sd3

WIDTH, HEIGHT, STEPS, TOKENS = 96, 64, 4, 24


@pytest.mark.parametrize(
    ("model", "t5", "scale"), [("medium", True, 5.0), ("5-medium", False, 5.0), ("5-large", True, 1.0)]
)
def test_equals_diffusers_pipeline(tmp_path: Path, model: str, t5: bool, scale: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    made = make_tiny_sd3(tmp_path, model=model, t5=t5)
    family = SD3.changed(SD3Options, t5xxl_max_token_length=TOKENS)
    checkpoint = family.inspect(str(made.path), vae=None, tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    family = family.for_model(checkpoint)
    tokenizers = family.load_tokenizers(checkpoint)
    encoders = family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu")
    models = ImageModels(
        family,
        tokenizers=tokenizers,
        text_encoders=encoders,
        denoiser=family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
        vae=family.load_vae(checkpoint, dtype=torch.float32, device="cpu"),
    )
    for encoder in encoders[:2]:  # the tiny tokenizer's end token is not the last of the tiny vocabulary
        encoder.text_model.eos_token_id = tokenizers[0].eos_token_id
    # the published configuration, of which a file's tensors say nothing
    models.vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    third = {"text_encoder_3": encoders[2], "tokenizer_3": tokenizers[2]} if t5 else {}
    pipeline = StableDiffusion3Pipeline(
        transformer=diffusers_transformer(MODELS[model]).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=models.vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        **{"text_encoder_3": None, "tokenizer_3": None, **third},
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = ImageSettings("a photo of the cat", "red dog", WIDTH, HEIGHT, STEPS, scale, "euler", seed=3)
    found = {}
    for name, kind in (("latents", "latent"), ("image", "pil")):
        with torch.no_grad():
            found[name] = pipeline(
                settings.prompt,
                negative_prompt=settings.negative_prompt,
                width=WIDTH,
                height=HEIGHT,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                max_sequence_length=TOKENS if t5 else 77,  # rows of zeros stand for a missing T5
                generator=torch.Generator().manual_seed(3),
                output_type=kind,
            ).images
    options = GenerateOptions(torch.device("cpu"))
    latents = generate_latents(models, [settings], options)
    torch.testing.assert_close(latents, found["latents"], rtol=0, atol=1e-4)
    (image,) = decode_images(models, latents, options)
    difference = np.asarray(image).astype(int) - np.asarray(found["image"][0]).astype(int)
    assert np.abs(difference).max() <= 1
