"""Highres fix: generate a small image, then a large one from it, because models repeat objects above their own size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from library.architectures.conditioning import Conditioning
from library.config.image_settings import ImageSettings
from library.inference.denoise import Feature
from library.inference.features.image_to_image import ImageToImage, encode_sources
from library.inference.generate import decode_images, generate_latents
from library.inference.models import GenerateOptions, ImageModels
from library.inference.options import SIZE_NAMES
from library.inference.upscaling import Upscaler, enlarged

if TYPE_CHECKING:
    from PIL.Image import Image

#: default strength of the second stage
STRENGTH = 0.8
#: sides of the first stage are multiples of this many pixels, as in sd-scripts
_STEP = 32


@dataclass(frozen=True)
class HighresFix:
    """Settings of the two stages.

    Attributes:
        scale: sides of the first stage over those of the second, above 0 and below 1.
        steps: of the first stage.
        strength: of the first stage, if it starts from an image; None for that of the settings.
        saves_first: whether the small images are saved too.
        in_latents: enlarge the latents, without decoding and encoding them.
        upscaler: what enlarges, instead of Lanczos.
        keeps_control: whether the second stage has the ControlNets of the first.
    """

    scale: float
    steps: int = 28
    strength: float | None = None
    saves_first: bool = False
    in_latents: bool = False
    keeps_control: bool = True
    upscaler: Upscaler | None = None

    def first(self, settings: ImageSettings) -> ImageSettings:
        """Return the settings of the first stage."""
        width, height = (
            max(int(side * self.scale + 0.5) // _STEP * _STEP, 2 * _STEP) for side in (settings.width, settings.height)
        )
        strength = self.strength if self.strength is not None and settings.image is not None else settings.strength
        given = {name: getattr(settings, name) for name in SIZE_NAMES if getattr(settings, name) is not None}
        sizes: dict[str, Any] = {name: int(pixels * self.scale + 0.5) for name, pixels in given.items()}
        return replace(settings, width=width, height=height, steps=self.steps, strength=strength, **sizes)

    def second(self, settings: ImageSettings) -> ImageSettings:
        """Return the settings of the second stage, with the noise of the next seed."""
        strength = STRENGTH if settings.strength is None else settings.strength
        control = settings.control if self.keeps_control else None
        return replace(settings, seed=settings.seed + 1, image=None, mask=None, strength=strength, control=control)


def latents_of_two_stages(
    models: ImageModels,
    batch: Sequence[ImageSettings],
    options: GenerateOptions,
    encoded: dict[str, Conditioning],
    fix: HighresFix,
    features: Sequence[Feature] = (),
    features_of_second: Sequence[Feature] = (),
) -> tuple[list[Image], Tensor]:
    """Generate the latents of a batch.

    Args:
        features, features_of_second: of the two stages.

    Returns:
        the small images, if they are needed, and the latents (B, C, h, w) of the large ones.
    """
    first, second = [fix.first(s) for s in batch], [fix.second(s) for s in batch]
    latents = generate_latents(models, first, options, encoded, features)
    in_latents = fix.in_latents or (fix.upscaler is not None and fix.upscaler.reads_latents)
    small = decode_images(models, latents, options) if fix.saves_first or not in_latents else []
    if fix.upscaler is not None:
        size = (second[0].width, second[0].height)
        sources = fix.upscaler.sources(models, latents, small, size, [s.seed for s in second], options)
    elif fix.in_latents:
        stride = models.architecture.latent.stride
        size = (second[0].height // stride, second[0].width // stride)  # (h, w)
        sources = functional.interpolate(latents.float(), size, mode="bicubic", align_corners=False)
    else:
        pixels = torch.stack([enlarged(image, (second[0].width, second[0].height)) for image in small])
        sources = encode_sources(models, pixels, [s.seed for s in second], options.device)
    return small, generate_latents(models, second, options, encoded, [*features_of_second, ImageToImage(sources)])
