"""The models that generate images, and the settings for all images of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.memory.placing import stage


@dataclass(frozen=True)
class ImageModels:
    """The models of one family, frozen or during training.

    Models that a step does not use may be missing: the VAE in ``generate_latents``, all others in ``decode_images``.
    """

    architecture: Architecture
    tokenizers: Sequence[Any] = ()
    text_encoders: Sequence[nn.Module | None] = ()  # None: its outputs are in ``cached_texts``
    denoiser: nn.Module | None = None
    vae: nn.Module | None = None
    v_prediction: bool = False
    adapters: Sequence[nn.Module] = ()  # networks applied to the other models, so that their dropout is off too
    adapter_names: Sequence[str] = ()  # their files, for messages
    #: further models, by the class of the feature that uses them
    of_features: Mapping[type, Any] = field(default_factory=dict)
    #: text -> conditioning, for encoders that are not loaded
    cached_texts: Mapping[str, Conditioning] = field(default_factory=dict)

    @contextlib.contextmanager
    def vae_on(self, device: torch.device) -> Iterator[nn.Module]:
        """Return a context with the VAE on a device, wherever it is kept otherwise."""
        assert self.vae is not None
        with stage(device, self.vae):
            yield self.vae

    def modules(self) -> list[nn.Module]:
        models = (*self.text_encoders, self.denoiser, self.vae, *self.adapters)
        return [model for model in models if model is not None]


@dataclass(frozen=True)
class GenerateOptions:
    """Settings of sampling that are the same for all images of a run."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # dtype of autocast in text encoders and denoiser; float32 for no autocast
    zero_terminal_snr: bool = False
    zero_steps_offset: bool = False  # timesteps without the offset that the models were released with
    clip_skip: int | None = None
    max_token_length: int | None = None  # text window in tokens: 75 (or None), 150 or 225
    weighted: bool = True  # whether (word:1.2) and [word] in prompts are emphasis
    vae_batch_size: int = 1  # images decoded at once
    nan_remedy: str = "try --no_half_vae or bf16"  # advice for images that are not finite
    #: called before each denoising step; an exception from it ends the generation
    check: Callable[[], None] = lambda: None
