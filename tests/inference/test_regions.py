"""Parts of a prompt, and networks, for regions of an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.features.regions import Regions
from library.inference.generate import generate_latents
from library.inference.models import GenerateOptions, ImageModels
from library.inference.region_masks import read_regions
from library.inference.sources import with_regions
from networks import lora

LEFT, RIGHT = (255, 0, 0), (0, 255, 0)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Red at the left, green at the right."""
    return halves(tmp_path / "mask.png", LEFT, RIGHT)


def halves(path: Path, left: tuple[int, ...], right: tuple[int, ...]) -> Path:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = left, right
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def adapted(models: ImageModels) -> Iterator[ImageModels]:
    """The model with two LoRAs of different effects."""
    networks = []
    for seed in (1, 2):
        network = lora.create_network(1.0, 4, 4, None, models.text_encoders[0], models.denoiser)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in network.named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if "lora_up" in name else 0.1)
        network.apply_to(models.text_encoders[0], models.denoiser)
        networks.append(network)
    yield replace(models, adapters=networks, adapter_names=["a", "b"])
    for network in reversed(networks):
        network.remove()


def draw(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, prompt: str, mask: Path | None = None
) -> torch.Tensor:
    settings = replace(settings, prompt=prompt)
    if mask is None:
        return generate_latents(models, [settings], options)
    return generate_latents(models, [with_regions(settings, mask)], options, features=[Regions()])


def test_equal_parts_are_the_prompt_alone(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, mask: Path
) -> None:
    """Up to the small number that keeps the blend finite."""
    plain = draw(models, options, settings, "the cat")
    torch.testing.assert_close(draw(models, options, settings, "the cat AND the cat", mask), plain, atol=2e-3, rtol=0)
    three = replace(settings, negative_scale=1.5)
    found = draw(models, options, three, "the cat AND the cat", mask)
    torch.testing.assert_close(found, draw(models, options, three, "the cat"), atol=2e-3, rtol=0)


def test_parts_and_regions_change_places_together(
    models: ImageModels, options: GenerateOptions, settings: ImageSettings, mask: Path, tmp_path: Path
) -> None:
    found = draw(models, options, settings, "cat AND dog of the", mask)
    swapped = draw(models, options, settings, "dog of the AND cat", halves(tmp_path / "b.png", RIGHT, LEFT))
    torch.testing.assert_close(found, swapped, atol=1e-4, rtol=0)
    assert (found - draw(models, options, settings, "dog of the AND cat", mask)).abs().max() > 1e-2


def test_networks_stay_in_their_regions(
    adapted: ImageModels, options: GenerateOptions, settings: ImageSettings, mask: Path, tmp_path: Path
) -> None:
    prompt, unguided = "cat AND cat", replace(settings, scale=1.0, steps=1, width=256)
    both = draw(adapted, options, unguided, prompt, mask)
    adapted.adapters[1].set_multiplier(0.0)
    first = draw(adapted, options, unguided, prompt, mask)
    adapted.adapters[0].set_multiplier(0.0)
    neither = draw(adapted, options, unguided, prompt, mask)
    torch.testing.assert_close(neither, draw(adapted, options, unguided, "cat"), atol=2e-3, rtol=0)
    change = (first - neither).abs().mean(dim=(0, 1, 2))  # (w,)
    assert change[:4].mean() > 1.5 * change[-4:].mean()  # features see their neighbours, so some of it is everywhere
    change = (both - first).abs().mean(dim=(0, 1, 2))
    assert change[-4:].mean() > 1.5 * change[:4].mean()


def test_one_network_for_the_whole_image_is_that_network(
    adapted: ImageModels, options: GenerateOptions, settings: ImageSettings, tmp_path: Path
) -> None:
    adapted.adapters[1].set_multiplier(0.0)
    everywhere = halves(tmp_path / "all.png", LEFT, LEFT)
    unguided = replace(settings, scale=1.0)
    found = draw(
        replace(adapted, adapters=adapted.adapters[:1], adapter_names=["a"]), options, unguided, "cat", everywhere
    )
    torch.testing.assert_close(found, draw(adapted, options, unguided, "cat"), atol=2e-3, rtol=0)
    assert all(adapter.gate is None and adapter.enabled for network in adapted.adapters for adapter in network.adapters)


def test_mistakes(adapted: ImageModels, options: GenerateOptions, settings: ImageSettings, mask: Path) -> None:
    with pytest.raises(UserError, match="2 networks for 1 parts of the prompt"):
        draw(adapted, options, settings, "cat", mask)
    with pytest.raises(UserError, match="need a map of their regions, --mask_path"):
        with_regions(replace(settings, prompt="a AND b"), None)
    foreign = replace(adapted, adapters=[torch.nn.Linear(1, 1)], adapter_names=["other.safetensors"])
    with pytest.raises(UserError, match=r"module of other\.safetensors cannot be kept within a region"):
        draw(foreign, options, settings, "a AND b", mask)


def test_maps(mask: Path, tmp_path: Path) -> None:
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    found = read_regions(mask, 4)
    assert torch.equal(found[0], left) and torch.equal(found[1], 1 - left)
    assert found[2].min() == 1 and found[3].min() == 1  # no blue, and no channel: the whole image
    coded = read_regions(halves(tmp_path / "codes.png", (255, 255, 0), (0, 0, 0)), 4, color_codes=3)
    assert coded[0].max() == 0 and coded[1].max() == 0  # no pixel is pure red or green
    assert torch.equal(coded[2], left) and coded[3].min() == 1
