"""Guidance by CLIP and VGG16, and CLIP vision conditioning, with tiny models of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.features.clip_vision import ClipVision
from library.inference.features.image_guidance import ImageGuidance, Seers
from library.inference.generate import begin, decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from library.inference.seeing_models import ClipSeer, VggSeer


@pytest.fixture(scope="module")
def clip() -> ClipSeer:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**shared, "image_size": 32, "patch_size": 8}, {**shared, "vocab_size": 300, "eos_token_id": 299}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))

    def tokenizer(words: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[298, *(ord(letter) % 256 for letter in words), 299])

    return ClipSeer(model.eval().requires_grad_(False), tokenizer)


@pytest.fixture(scope="module")
def vgg() -> VggSeer:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    return VggSeer(layers.eval().requires_grad_(False))


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = (255, 40, 40)
    Image.fromarray(pixels).save(tmp_path / "guide.png")
    return tmp_path / "guide.png"


def latents(
    models: ImageModels, options: GenerateOptions, batch: Sequence[ImageSettings], seers: Seers
) -> torch.Tensor:
    models = replace(models, of_features={ImageGuidance: seers})
    return generate_latents(models, batch, options, features=[ImageGuidance()])


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "lms"])
@pytest.mark.parametrize("kind", ["clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale"])
def test_the_image_moves_towards_its_goal(
    models: ImageModels,
    options: GenerateOptions,
    settings: ImageSettings,
    clip: ClipSeer,
    vgg: VggSeer,
    guide: Path,
    sampler: str,
    kind: str,
) -> None:
    settings = replace(settings, sampler=sampler, steps=6, guide=guide)
    seers = Seers(clip, vgg)
    far, near = (latents(models, options, [replace(settings, own={kind: scale})], seers) for scale in (1e-9, 30.0))

    def distance(found: torch.Tensor) -> float:
        pixels = torch.from_numpy(np.asarray(decode_images(models, found, options)[0])).permute(2, 0, 1)[None] / 255
        goal = torch.from_numpy(np.asarray(Image.open(guide))).permute(2, 0, 1)[None] / 255
        if kind == "vgg16_guidance_scale":
            return float((vgg.see(pixels) - vgg.see(goal)).square().mean())
        small = [torch.nn.functional.interpolate(one, clip.size) for one in (pixels, goal)]
        other = clip.see_texts([settings.prompt]) if kind == "clip_guidance_scale" else clip.see(small[1])
        return float((clip.see(small[0]) - other).norm())

    with torch.no_grad():
        assert distance(near) < distance(far)


def test_a_scale_near_zero_changes_nothing_and_images_do_not_depend_on_their_batch(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, clip: ClipSeer, vgg: VggSeer, guide: Path
) -> None:
    plain = generate_latents(models, [settings], options)
    nothing = replace(settings, own={"clip_guidance_scale": 1e-12})
    torch.testing.assert_close(latents(models, options, [nothing], Seers(clip, vgg)), plain, atol=1e-5, rtol=1e-5)
    own = {"clip_guidance_scale": 50.0, "clip_prompt": "a dog"}
    one, two = replace(settings, own=own), replace(settings, own=own, seed=9)
    alone = latents(models, options, [one], Seers(clip, vgg))
    both = latents(models, options, [two, one], Seers(clip, vgg))
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    assert (alone - plain).abs().max() > 1e-3
    other = latents(models, options, [replace(one, own={**own, "clip_prompt": "zebra"})], Seers(clip, vgg))
    assert (other - alone).abs().max() > 1e-4


def test_other_samplers_are_refused(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, clip: ClipSeer
) -> None:
    one = replace(settings, sampler="euler", own={"clip_guidance_scale": 50.0})
    with pytest.raises(UserError, match="work with ddim, pndm, lms, k_lms, not with euler"):
        latents(models, options, [one], Seers(clip))


def test_long_texts_keep_their_end(clip: ClipSeer) -> None:
    with torch.no_grad():
        long, end = clip.see_texts(["x" * 100 + "y" * 75]), clip.see_texts(["y" * 75])
    torch.testing.assert_close(long, end)


def test_clip_vision_replaces_the_pooled_text(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, guide: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from library.architectures.conditioning import Conditioning

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, projection_dim=64, image_size=32, patch_size=8)
    model = CLIPVisionModelWithProjection(config).eval()
    one = replace(settings, image=guide, own={"clip_vision_strength": 2.0})
    with torch.inference_mode():
        generation = begin(replace(models, of_features={ClipVision: model}), [one], options, {})
        generation.conditioning = Conditioning({"pool2": torch.zeros(1, 64)})
        ClipVision().prepare(generation)
        doubled = generation.conditioning["pool2"]
        generation.settings = [replace(one, own={"clip_vision_strength": 1.0})]
        ClipVision().prepare(generation)
    torch.testing.assert_close(doubled, generation.conditioning["pool2"] * 2)
    assert doubled.abs().max() > 0
