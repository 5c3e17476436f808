"""Whole sampling of Lumina-Image 2.0 equals diffusers' pipeline, from the same weights, texts and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.config.image_settings import ImageSettings
from library.inference.features.normed_guidance import limited
from library.inference.generate import decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.architectures.lumina.opened import diffusers_transformer, opened
from tests.fixtures.tiny_lumina import make_tiny_lumina

WIDTH, HEIGHT, STEPS, TOKENS = 96, 64, 4, 48
SYSTEM = "you paint"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ImageModels:
    made = make_tiny_lumina(tmp_path_factory.mktemp("lumina"))
    family, checkpoint = opened(made, gemma2_max_token_length=TOKENS, system_prompt=SYSTEM)
    vae = family.load_vae(checkpoint, dtype=torch.float32, device="cpu")
    # the published configuration, of which a file's tensors say nothing
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return ImageModels(
        family,
        tokenizers=family.load_tokenizers(checkpoint),
        text_encoders=family.load_text_encoders(checkpoint, dtype=torch.float32, device="cpu"),
        denoiser=family.load_denoiser(checkpoint, dtype=torch.float32, device="cpu"),
        vae=vae,
    )


@pytest.mark.parametrize(
    ("scale", "ours", "theirs"),
    [
        pytest.param(4.0, 1.0, 1.0, id="guided all the way"),
        # the image's share at the four steps is 0, 0.05, 0.14 and 0.33; the pipeline counts steps
        pytest.param(4.0, 0.1, 0.5, id="two guided steps"),
        pytest.param(1.0, 1.0, 1.0, id="not guided"),
    ],
)
def test_equals_diffusers_pipeline(models: ImageModels, scale: float, ours: float, theirs: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    pipeline = Lumina2Pipeline(
        transformer=diffusers_transformer(models.denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=models.vae,
        text_encoder=models.text_encoders[0],
        tokenizer=models.tokenizers[0],
    )
    pipeline.tokenizer.padding_side = "right"
    pipeline.set_progress_bar_config(disable=True)
    settings = ImageSettings(
        "a photo of the cat", "red dog", WIDTH, HEIGHT, STEPS, scale, "euler", seed=3,
        own={"cfg_trunc_ratio": ours, "renorm_cfg": 0.0},
    )  # fmt: skip
    found = {}
    for name, kind in (("latents", "latent"), ("image", "pil")):
        with torch.no_grad():
            found[name] = pipeline(
                settings.prompt,
                negative_prompt=settings.negative_prompt,
                system_prompt=SYSTEM,
                width=WIDTH,
                height=HEIGHT,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                cfg_trunc_ratio=theirs,
                cfg_normalization=False,
                max_sequence_length=TOKENS,
                generator=torch.Generator().manual_seed(3),
                output_type=kind,
            ).images
    options = GenerateOptions(torch.device("cpu"))
    latents = generate_latents(models, [settings], options)
    torch.testing.assert_close(latents, found["latents"], rtol=0, atol=1e-4)
    (image,) = decode_images(models, latents, options)
    difference = np.asarray(image).astype(int) - np.asarray(found["image"][0]).astype(int)
    assert np.abs(difference).max() <= 1, "the latents are scaled back once"


def test_images_of_a_batch_are_those_of_each_alone(models: ImageModels) -> None:
    """The prompts' and negative prompts' lengths differ."""
    batch = [
        ImageSettings(
            prompt, negative, 64, 64, STEPS, 4.0, "euler", seed, own={"cfg_trunc_ratio": 0.1, "renorm_cfg": 1.0}
        )
        for prompt, negative, seed in (("a cat", "", 1), ("a photo of the red dog", "blue", 2))
    ]
    options = GenerateOptions(torch.device("cpu"))
    together = generate_latents(models, batch, options)
    alone = torch.cat([generate_latents(models, [one], options) for one in batch])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_only_the_guided_steps_take_the_negative_prompt(models: ImageModels) -> None:
    rows: list[int] = []
    handle = models.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        settings = ImageSettings(
            "a cat", "a dog", 64, 64, STEPS, 4.0, "euler", 1, own={"cfg_trunc_ratio": 0.1, "renorm_cfg": 1.0}
        )
        generate_latents(models, [settings], GenerateOptions(torch.device("cpu")))
    finally:
        handle.remove()
    assert rows == [2, 2, 1, 1]


def test_a_guided_prediction_is_no_longer_than_that_with_the_prompt() -> None:
    with_prompt = torch.randn(2, 16, 4, 6)
    guided = with_prompt * torch.tensor([3.0, 0.5]).view(-1, 1, 1, 1)
    found = limited(guided, with_prompt, 1.0)
    torch.testing.assert_close(found[0], with_prompt[0])
    assert torch.equal(found[1], guided[1]), "shorter ones stay as they are"
    torch.testing.assert_close(limited(guided, with_prompt, 2.0)[0], 2 * with_prompt[0])
    assert torch.equal(limited(guided, with_prompt, 0.0), guided)
