"""Start from an image instead of from noise: img2img.

Meng et al. 2021, "SDEdit" (arXiv:2108.01073): the image is noised to the level of an intermediate step, and sampling
continues from there. At strength s the last ``int(steps * s)`` steps are run, as in diffusers' img2img pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.config.image_settings import ImageSettings
from library.inference.denoise import Feature, Generation
from library.inference.models import ImageModels
from library.inference.sources import read_pixels
from library.randomness import torch_generator

#: name of the source's latents (B, C, h, w), as the denoiser sees them, among the facts of a generation
SOURCE = "source latents"


class ImageToImage(Feature):
    """Noise each image's source to the level of the first step that is run.

    Args:
        sources: latents (B, C, h, w) as the denoiser sees them; None reads the images of the settings.
    """

    order = 20

    def __init__(self, sources: Tensor | None = None) -> None:
        self._sources = sources

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether there is an image to start from."""
        return settings.image is not None

    def prepare(self, generation: Generation) -> None:
        source = _read_sources(generation) if self._sources is None else self._sources.to(generation.noise)
        generation.facts[SOURCE] = source
        scheduler, first = generation.scheduler, generation.first
        assert first.strength is not None, "images to start from have a strength"
        start = _start(len(generation.timesteps), first.steps, first.strength, int(getattr(scheduler, "order", 1)))
        generation.timesteps = generation.timesteps[start:]
        if not len(generation.timesteps):  # the source as the VAE gives it back
            generation.latents = source
            return
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        if start == 0 and first.strength == 1.0:
            return  # nothing of the source is left
        level = generation.timesteps[:1].expand(len(source))
        generation.latents = scheduler.add_noise(source, generation.noise, level)


def _start(calls: int, steps: int, strength: float, order: int) -> int:
    """Return the index of the first call that is run.

    Second-order schedulers call the model twice per step, and list both calls as timesteps.
    """
    skipped = max(steps - min(int(steps * strength), steps), 0)
    return min(skipped * order if calls > steps else skipped, calls)


def _read_sources(generation: Generation) -> Tensor:
    first, paths = generation.first, [settings.image for settings in generation.settings]
    pixels = torch.stack([read_pixels(path, (first.width, first.height)) for path in paths if path is not None])
    seeds = [settings.seed for settings in generation.settings]
    return encode_sources(generation.models, pixels, seeds, generation.options.device).to(generation.noise)


def encode_sources(models: ImageModels, pixels: Tensor, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Encode pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) as the denoiser sees them.

    The encoder's random numbers are keyed by the images' seeds.
    """
    generators = [torch_generator(seed, "source image") for seed in seeds]
    with (
        models.vae_on(device) as vae,
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
    ):
        # one at a time: encoding takes far more memory than sampling
        latents = [
            models.architecture.encode_images(vae, image.unsqueeze(0), [generator])
            for image, generator in zip(pixels, generators, strict=True)
        ]
        return models.architecture.scale_latents(torch.cat(latents))
