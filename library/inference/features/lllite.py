"""Guide images by ControlNet-LLLites, which change the inputs of attention layers.

Shape legend: B images, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.architectures.base import Architecture
from library.config.image_settings import ImageSettings
from library.inference.control_models import ControlModel, control_images, used_as_given
from library.inference.denoise import Denoise, Feature, Generation, StepInfo
from library.inference.feature_options.control_net import DECLARATION, ControlOptions
from library.inference.models import ImageModels
from library.memory.placing import move
from networks.lllite import LLLiteNetwork

FLAG = "--control_net_lllite_models"


class LLLites(Feature):
    """Change the inputs of attention layers by ControlNet-LLLites."""

    order = 50
    declaration = DECLARATION

    def __init__(self) -> None:
        self._models: Sequence[ControlModel] = ()
        self._images: Sequence[Tensor] = ()

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether there is an image to read."""
        return settings.control is not None

    @classmethod
    def check(cls, options: Any, architecture: Architecture, checkpoint: Any) -> None:
        paths = options.control.control_net_lllite_models
        if paths:
            denoiser = architecture.load_denoiser(checkpoint, dtype=torch.float32, device="meta")
            for path in paths:
                LLLiteNetwork.from_file(path, denoiser, flag=FLAG)

    @classmethod
    def load(
        cls, options: Any, models: ImageModels, checkpoint: Any, dtype: torch.dtype, device: torch.device
    ) -> Sequence[ControlModel] | None:
        given: ControlOptions = options.control
        assert models.denoiser is not None
        loaded = []
        for path in given.control_net_lllite_models or []:
            network = LLLiteNetwork.from_file(path, models.denoiser, flag=FLAG)
            move(network, device, dtype).eval()
            network.apply_to_denoiser()
            loaded.append(network)
        return used_as_given(loaded, given) or None

    def prepare(self, generation: Generation) -> None:
        self._models = generation.models.of_features.get(LLLites) or ()
        if self._models:
            self._images = control_images(generation, self._models)
        for control in self._models:
            control.model.set_multiplier(control.weight)

    def wrap(self, denoise: Denoise) -> Denoise:
        if not self._models:
            return denoise

        def guided(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            for control, image in zip(self._models, self._images, strict=True):
                # an image is read once, and stays until its network stops to act
                if step.index == 0 or not control.acts(step):
                    control.model.set_images(image if control.acts(step) else None)
            prediction = denoise(noisy, timesteps, step)
            if step.index + 1 == step.count:
                for control in self._models:
                    control.model.set_images(None)
            return prediction

        return guided
