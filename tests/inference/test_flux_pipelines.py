"""Whole sampling of FLUX.1 and Chroma equals diffusers' pipelines, from the same weights, texts and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.flux.packing import unpack_latents
from library.config.image_settings import ImageSettings
from library.inference.generate import decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from tests.architectures.flux.oracle import diffusers_model
from tests.fixtures.loaded_flux import models_of
from tests.fixtures.tiny_flux import FluxFileSizes, MadeFlux, make_tiny_flux

#: of diffusers' own modules, about their next version
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = FluxFileSizes()
KINDS = ("dev", "schnell", "chroma")
WIDTH, HEIGHT, STEPS = 96, 64, 4
PROMPT, NEGATIVE = "a photo of the cat", "red dog"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeFlux]:
    return {kind: make_tiny_flux(tmp_path_factory.mktemp(kind), model=kind) for kind in KINDS}


def pipeline_of(kind: str, made: MadeFlux, models: ImageModels, shift: float | None) -> Any:
    """diffusers' pipeline with its own transformer, and the text encoders and autoencoder of ``models``.

    Args:
        shift: of the noise levels; None: by the image's size.
    """
    import diffusers

    # the published configuration, of which a file's tensors say nothing
    models.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    transformer = diffusers_model(load_file(made.path), SIZES).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift is None, shift=shift or 1.0)
    parts = {"scheduler": scheduler, "vae": models.vae, "transformer": transformer}
    if kind == "chroma":
        pipeline = diffusers.ChromaPipeline(
            **parts, text_encoder=models.text_encoders[0], tokenizer=models.tokenizers[0]
        )
        # it hands the mask on as numbers, which are added to the scores and hide nothing
        prepare = pipeline._prepare_attention_mask

        def as_bool(**given: Any) -> Tensor | None:
            mask = prepare(**given)
            return None if mask is None else mask.bool()

        pipeline._prepare_attention_mask = as_bool
    else:
        names = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
        encoders = dict(zip(names[0], models.text_encoders, strict=True))
        # by which transformers finds the end of the text; the tiny tokenizer has another one than the published
        encoders["text_encoder"].eos_token_id = models.tokenizers[0].eos_token_id
        pipeline = diffusers.FluxPipeline(**parts, **encoders, **dict(zip(names[1], models.tokenizers, strict=True)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_of(kind: str, **more: Any) -> ImageSettings:
    guidance = 0.0 if kind == "chroma" else 3.5
    return replace(
        ImageSettings(PROMPT, NEGATIVE, WIDTH, HEIGHT, STEPS, 1.0, "euler", seed=3, guidance_scale=guidance), **more
    )


def theirs(kind: str, pipeline: Any, settings: ImageSettings, **more: Any) -> Mapping[str, Any]:
    """Latents (1, C, h, w) and image of the pipeline."""
    arguments: dict[str, Any] = {
        "prompt": settings.prompt,
        "width": settings.width,
        "height": settings.height,
        "num_inference_steps": settings.steps,
        "max_sequence_length": 256 if kind == "schnell" else 512,
        **more,
    }
    if settings.scale != 1.0:
        arguments["negative_prompt"] = settings.negative_prompt
    if kind == "chroma":
        arguments["guidance_scale"] = settings.scale
    else:
        arguments |= {"guidance_scale": settings.guidance_scale, "true_cfg_scale": settings.scale}
    found = {}
    for name, kind_of_output in (("latents", "latent"), ("image", "pil")):
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            found[name] = pipeline(**arguments, generator=generator, output_type=kind_of_output).images
    latents = unpack_latents(found["latents"], (settings.height // 8, settings.width // 8))
    return {"latents": latents, "image": found["image"][0]}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param("dev", {}, marks=slow),
        pytest.param("dev", {"scale": 3.0, "guidance_scale": 1.5}),
        pytest.param("schnell", {}, marks=slow),
        pytest.param("chroma", {}, marks=slow),
        pytest.param("chroma", {"scale": 4.0}),
        # as diffusers' copies of Chroma are configured
        pytest.param("chroma", {"scale": 4.0, "own": {"flow_shift": 3.0}}, marks=slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_equals_diffusers_pipeline(made: dict[str, MadeFlux], kind: str, change: dict[str, float]) -> None:
    models = models_of(kind, made[kind])
    settings = settings_of(kind, **change)
    shift = settings.own.get("flow_shift") or (1.0 if kind == "schnell" else None)
    expected = theirs(kind, pipeline_of(kind, made[kind], models, shift), settings)
    options = GenerateOptions(torch.device("cpu"))
    latents = generate_latents(models, [settings], options)
    assert latents.shape == (1, 16, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=1e-4)
    (image,) = decode_images(models, latents, options)
    assert image.size == (WIDTH, HEIGHT)
    difference = np.asarray(image).astype(int) - np.asarray(expected["image"]).astype(int)
    assert np.abs(difference).max() <= 1


@slow
def test_masked_text_equals_diffusers_pipeline(made: dict[str, MadeFlux]) -> None:
    models = models_of("dev", made["dev"], apply_t5_attn_mask=True)
    settings = settings_of("dev")
    pipeline = pipeline_of("dev", made["dev"], models, None)
    clip, t5 = models.text_encoders
    given = models.tokenizers[1](PROMPT, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    words = models.tokenizers[0](PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    image = torch.ones(1, WIDTH * HEIGHT // 256, dtype=torch.bool)
    mask = torch.cat([given.attention_mask.bool(), image], dim=1)[:, None, None]
    assert not mask.all()
    with torch.no_grad():
        latents = pipeline(
            prompt_embeds=t5(given.input_ids, attention_mask=given.attention_mask).last_hidden_state,
            pooled_prompt_embeds=clip(words).pooler_output,
            width=WIDTH,
            height=HEIGHT,
            num_inference_steps=STEPS,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(settings.seed),
            joint_attention_kwargs={"attention_mask": mask},
            output_type="latent",
        ).images
    expected = unpack_latents(latents, (HEIGHT // 8, WIDTH // 8))
    options = GenerateOptions(torch.device("cpu"))
    torch.testing.assert_close(generate_latents(models, [settings], options), expected, rtol=0, atol=1e-4)
    plain = generate_latents(models_of("dev", made["dev"]), [settings], options)
    assert (plain - expected).abs().max() > 1e-3


@slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dev", {"guidance_scale": 1.0}),
        ("dev", {"scale": 1.5}),
        ("dev", {"own": {"flow_shift": 1.0}}),
        ("dev", {"prompt": "dog"}),
        ("chroma", {"scale": 1.5}),
    ],
)
def test_every_setting_matters(made: dict[str, MadeFlux], kind: str, change: dict[str, Any]) -> None:
    models, options = models_of(kind, made[kind]), GenerateOptions(torch.device("cpu"))
    plain, changed = (generate_latents(models, [settings_of(kind, steps=2, **more)], options) for more in ({}, change))
    assert (plain - changed).abs().max() > 1e-3
