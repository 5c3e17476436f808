"""Generate images: a model's prediction, wrapped by features, followed by a scheduler.

A feature is one file of ``library/inference/features/``. It prepares the generation (its start, conditioning and
steps), wraps the prediction, and may change the latents after each step. The methods of ``Feature`` change nothing; a
feature overrides those that it needs.

Shape legend: B images, C latent channels, (h, w) latent size, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning, Control
from library.config.declaration import Declaration
from library.config.image_settings import ImageSettings
from library.config.prompt_options import PromptOption
from library.diffusion.objective import Objective
from library.inference.models import GenerateOptions, ImageModels


@dataclass(frozen=True)
class StepInfo:
    """The position in a generation.

    Attributes:
        index: number of the model's call, from 0; some samplers make several calls per step.
        count: number of all calls.
        timestep: () as the scheduler counts.
        following: the timestep of the next call; None at the last.
    """

    index: int
    count: int
    timestep: Tensor
    following: Tensor | None = None


#: (noisy latents (B, C, h, w), timesteps (B,), step) -> the model's prediction (B, C, h, w)
Denoise = Callable[[Tensor, Tensor, StepInfo], Tensor]


#: name, among the facts of a generation, of modules with the U-Net's way down that run beside it
WAYS_DOWN = "ways down"
#: the same of the conditioning of such modules, where it is not the U-Net's
CONTROL_CONDITIONING = "control conditioning"


#: name, among the further settings of an image, of the channels that the denoiser reads, if these are not its latents'
CHANNELS = "input_channels"


@dataclass
class Generation:
    """One batch to generate: features change it before the first step.

    Attributes:
        settings: of each image; only text and seed differ.
        encode: (texts, one for each image; whether they are negative) -> conditioning (B, T, D) with the image's size.
        encode_afresh: the same without what was encoded before, for encoders that a feature changes.
        conditioning: of the prediction; a feature that adds rows to a batch adds them here too.
        scheduler: with its timesteps set.
        generators: one for each image, keyed by its seed, for all random numbers of that image.
        latents: the start (B, C, h, w) of the first step.
        timesteps: of the steps that are run, in order.
    """

    models: ImageModels
    settings: Sequence[ImageSettings]
    options: GenerateOptions
    objective: Objective
    encode: Callable[[Sequence[str], bool], Conditioning]
    encode_afresh: Callable[[Sequence[str], bool], Conditioning]
    conditioning: Conditioning
    scheduler: Any
    generators: Sequence[torch.Generator]
    noise: Tensor
    latents: Tensor
    timesteps: Tensor
    facts: dict[str, Any] = field(default_factory=dict)  # what features share with each other
    #: what is added inside of the denoiser in a call with these arguments; None for nothing
    control: Callable[[Tensor, Tensor, StepInfo], Control | None] | None = None

    @property
    def first(self) -> ImageSettings:
        """Return the settings of the first image, for everything but text and seed."""
        return self.settings[0]


class Feature:
    """One change to a generation; a new object for each batch."""

    #: its options within prompts; values are in ``ImageSettings.own`` under the option's ``field``
    prompt_options: ClassVar[tuple[PromptOption, ...]] = ()
    #: its options on the command line of ``gen_img.py``: the ``DECLARATION`` of a file in ``feature_options/``
    declaration: ClassVar[Declaration] = Declaration()
    #: place among the features that are prepared and wrapped; the first is the outermost
    order: ClassVar[int] = 100

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether images of these settings get it; asked by ``wanted_features``."""
        return False

    @classmethod
    def given(cls, options: Any) -> Mapping[str, Any]:
        """Return what ``gen_img.py``'s options give all images, for ``ImageSettings.own``."""
        return {}

    @classmethod
    def check(cls, options: Any, architecture: Architecture, checkpoint: Any) -> None:
        """Refuse files of ``gen_img.py``'s options before anything is loaded. Raises UserError."""

    @classmethod
    def load(
        cls, options: Any, models: ImageModels, checkpoint: Any, dtype: torch.dtype, device: torch.device
    ) -> Any | None:
        """Return the models that it needs with these options; ``ImageModels.of_features`` holds them from then on."""
        return None

    def prepare(self, generation: Generation) -> None:
        """Change the start, the conditioning or the steps."""

    def wrap(self, denoise: Denoise) -> Denoise:
        """Return the prediction with this feature's change."""
        return denoise

    def after_step(self, latents: Tensor, step: StepInfo) -> Tensor:
        """Return the latents (B, C, h, w) for the next step."""
        return latents


def wanted_features(settings: ImageSettings, among: Sequence[type[Feature]]) -> list[Feature]:
    """Return a fresh object of each feature that images of these settings get, in the order of ``among``."""
    return [kind() for kind in among if kind.is_wanted(settings)]


def run(generation: Generation, features: Sequence[Feature]) -> Tensor:
    """Prepare the features in their order and sample; the first feature is the outermost around the prediction.

    Returns:
        the latents (B, C, h, w), float32.
    """
    for feature in features:
        feature.prepare(generation)
    denoise = _prediction(generation)
    for feature in reversed(features):
        denoise = feature.wrap(denoise)
    return _sample(generation, denoise, features)


def _prediction(generation: Generation) -> Denoise:
    """Return the model's own prediction, in the form that its scheduler needs."""
    models, objective = generation.models, generation.objective

    def predict(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
        control = generation.control(noisy, timesteps, step) if generation.control is not None else None
        output = models.architecture.predict(models.denoiser, noisy, timesteps, generation.conditioning, control)
        return objective.for_sampler(output.float(), timesteps)

    return predict


def _sample(generation: Generation, denoise: Denoise, features: Sequence[Feature]) -> Tensor:
    scheduler, latents = generation.scheduler, generation.latents
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generation.generators)} if draws else {}
    timesteps = generation.timesteps
    for index, timestep in enumerate(timesteps):
        generation.options.check()
        following = timesteps[index + 1] if index + 1 < len(timesteps) else None
        step = StepInfo(index, len(timesteps), timestep, following)
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = denoise(scaled, timestep.expand(len(latents)), step)
        latents = scheduler.step(prediction.float(), timestep, latents, return_dict=False, **extra)[0]
        for feature in features:
            latents = feature.after_step(latents, step)
    return latents
