"""Guide images by ControlNets: their outputs are added inside of the U-Net.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543). Several
ControlNets take turns from call to call, or the mean of their outputs is added, as the family says.

Shape legend: B images, R rows of the model's batch, C latent channels, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from library.architectures.base import Architecture
from library.architectures.common.controlnet import controlnet_source, load_controlnet, mean_of
from library.architectures.common.grown_embedding import give_each_layer
from library.architectures.conditioning import Control
from library.config.image_settings import ImageSettings
from library.inference.control_models import ControlModel, control_images, used_as_given
from library.inference.denoise import CONTROL_CONDITIONING, WAYS_DOWN, Feature, Generation, StepInfo
from library.inference.feature_options.control_net import DECLARATION, ControlOptions
from library.inference.models import ImageModels

FLAG = "--control_net_models"


class ControlNets(Feature):
    """Add the outputs of ControlNets that read the images ``control`` of the settings."""

    order = 40
    declaration = DECLARATION

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether there is an image to read."""
        return settings.control is not None

    @classmethod
    def check(cls, options: Any, architecture: Architecture, checkpoint: Any) -> None:
        for path in options.control.control_net_models or []:
            controlnet_source(path, checkpoint.unet, flag=FLAG)

    @classmethod
    def load(
        cls, options: Any, models: ImageModels, checkpoint: Any, dtype: torch.dtype, device: torch.device
    ) -> Sequence[ControlModel] | None:
        given: ControlOptions = options.control
        sources = [controlnet_source(path, checkpoint.unet, flag=FLAG) for path in given.control_net_models or []]
        loaded = [load_controlnet(source, dtype=dtype, device=str(device)) for source in sources]
        if options.model.XTI_embeddings and models.denoiser is not None:
            layers = models.architecture.text_layers(models.denoiser)
            for controlnet in loaded:  # each of its layers reads the text of the denoiser's layer that it is a copy of
                own = models.architecture.text_layers(controlnet)
                give_each_layer([own.get(name, ()) for name in layers])
        return used_as_given(loaded, given) or None

    def prepare(self, generation: Generation) -> None:
        loaded = generation.models.of_features.get(ControlNets)
        if not loaded:
            return
        architecture: Any = generation.models.architecture
        images = [architecture.control_image(pixels) for pixels in control_images(generation, loaded)]
        stride = architecture.latent.stride

        def control(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Control | None:
            places = range(len(loaded))
            if architecture.control_mixing == "alternate":
                places = range(step.index % len(loaded), step.index % len(loaded) + 1)
            channels = generation.noise.shape[1]
            noisy = noisy[:, :channels]  # inpainting models read more
            conditioning = generation.facts.get(CONTROL_CONDITIONING, generation.conditioning)
            found = [
                architecture.control(
                    loaded[n].model,
                    noisy,
                    timesteps,
                    conditioning,
                    _fitting(images[n], noisy, stride),
                    weight=loaded[n].weight,
                )
                for n in places
                if loaded[n].acts(step) and loaded[n].weight
            ]
            return mean_of(found) if found else None

        generation.control = control
        generation.facts[WAYS_DOWN] = [one.model for one in loaded]


def _fitting(images: Tensor, noisy: Tensor, stride: int) -> Tensor:
    """Return images (B, 3, H, W) of the size of latents (R, C, h, w), which may grow from step to step."""
    size = noisy.shape[-2] * stride, noisy.shape[-1] * stride
    if images.shape[-2:] == size:
        return images
    return functional.interpolate(images, size, mode="bicubic", align_corners=False).clamp(0, 1)
