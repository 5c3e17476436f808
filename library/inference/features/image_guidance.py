"""Guidance by models that see the image: CLIP towards a text or an image, VGG16 towards an image.

In each step the image that the model would reach is estimated, decoded, and compared with the goal; the gradient of the
difference moves the prediction. As in the CLIP guided pipeline of diffusers' community examples.

Shape legend: B images, C latent channels, (h, w) latent size, (H, W) pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from library.architectures.conditioning import Conditioning
from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.denoise import Denoise, Feature, Generation, StepInfo
from library.inference.feature_options.image_guidance import (
    DECLARATION,
    PROMPT_OPTIONS,
    SAMPLERS,
    SCALES,
    ImageGuidanceOptions,
)
from library.inference.models import ImageModels
from library.inference.seeing_models import ClipSeer, VggSeer, load_clip, load_vgg16
from library.inference.sources import read_pixels

#: (decoded images (B, 3, H, W) in [0, 1]) -> difference of each from its goal (B,)
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seers:
    """The models that see images."""

    clip: ClipSeer | None = None
    vgg: VggSeer | None = None


class ImageGuidance(Feature):
    """Move each image towards its text or its guide."""

    order = -10  # outside of the guidance by the negative prompt, whose result it changes
    prompt_options = PROMPT_OPTIONS
    declaration = DECLARATION

    def __init__(self) -> None:
        self._generation: Generation | None = None
        self._positive = Conditioning({})
        self._losses: list[Loss] = []
        self._shift: Tensor | None = None  # of latents behind the step

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether one of the scales is given."""
        return any(settings.own.get(name) for name in SCALES)

    @classmethod
    def given(cls, options: Any) -> Mapping[str, Any]:
        given: ImageGuidanceOptions = options.image_guidance
        return {name: getattr(given, name) for name in SCALES if getattr(given, name)}

    @classmethod
    def load(
        cls, options: Any, models: ImageModels, checkpoint: Any, dtype: torch.dtype, device: torch.device
    ) -> Seers | None:
        given: ImageGuidanceOptions = options.image_guidance
        by_clip = given.clip_guidance_scale or given.clip_image_guidance_scale
        seers = Seers(
            load_clip(device) if by_clip else None,
            load_vgg16(given.vgg16_guidance_layer, device) if given.vgg16_guidance_scale else None,
        )
        return seers if seers.clip or seers.vgg else None

    def prepare(self, generation: Generation) -> None:
        first = generation.first
        if first.sampler not in SAMPLERS:
            raise UserError(f"CLIP and VGG16 guidance work with {', '.join(SAMPLERS)}, not with {first.sampler}")
        self._generation = generation
        self._positive = generation.conditioning
        seers: Seers = generation.models.of_features[ImageGuidance]
        with torch.inference_mode(False), torch.no_grad():
            self._losses = list(_losses(seers, generation.settings, generation.options.device))

    def wrap(self, denoise: Denoise) -> Denoise:
        def guided(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            prediction = denoise(noisy, timesteps, step)
            assert self._generation is not None
            scheduler = self._generation.scheduler
            if hasattr(scheduler, "sigmas"):
                sigma = scheduler.sigmas[(scheduler.timesteps == step.timestep).nonzero()[0, 0]]
                signal, noise = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
            else:
                signal = scheduler.alphas_cumprod[int(step.timestep)].to(noisy) ** 0.5
                sigma, noise = None, (1 - signal**2) ** 0.5
            gradient = self._gradient(noisy, timesteps, signal, noise, mixes=sigma is None)
            if sigma is not None:
                # the derivative is not changed, so a shift of the latents before the step is one behind it
                self._shift = -gradient * sigma**2
                return prediction
            change = noise * gradient
            if scheduler.config.prediction_type == "v_prediction":
                change = change / signal
            return prediction + change

        return guided

    def after_step(self, latents: Tensor, step: StepInfo) -> Tensor:
        shift, self._shift = self._shift, None
        return latents if shift is None else latents + shift

    def _gradient(self, noisy: Tensor, timesteps: Tensor, signal: Tensor, noise: Tensor, *, mixes: bool) -> Tensor:
        """Return the gradient (B, C, h, w) of the differences by the noisy latents.

        Args:
            signal, noise: noisy = signal * image + noise * noise.
            mixes: whether the estimate is mixed with the noisy latents, the less noise the more.
        """
        assert self._generation is not None
        models, objective = self._generation.models, self._generation.objective
        assert models.denoiser is not None and models.vae is not None
        with torch.inference_mode(False), torch.enable_grad():
            latents = (noisy if mixes else noisy / signal).detach().clone().requires_grad_(True)
            conditioning = Conditioning({name: t.clone() for name, t in self._positive.tensors.items()})
            seen = latents if mixes else latents * signal.clone()
            output = models.architecture.predict(models.denoiser, seen, timesteps.clone(), conditioning)
            output = objective.for_sampler(output.float(), timesteps)
            signal, noise = signal.clone(), noise.clone()
            if self._generation.scheduler.config.prediction_type == "v_prediction":
                image = signal * seen - noise * output
            else:
                image = (seen - noise * output) / signal
            image = noise * image + (1 - noise) * latents if mixes else image
            pixels = models.architecture.decode_latents(models.vae, image.to(models.vae.dtype))
            pixels = ((pixels.float() + 1) / 2).clamp(0, 1)
            loss = torch.stack([loss(pixels) for loss in self._losses]).sum()
            return torch.autograd.grad(loss, latents)[0]


def _losses(seers: Seers, settings: Sequence[ImageSettings], device: torch.device) -> Sequence[Loss]:
    first, found = settings[0], []
    clip_scale, image_scale, vgg_scale = (float(first.own.get(name) or 0.0) for name in SCALES)
    size = (first.width, first.height)
    guides: Tensor | None = None
    if first.guide is not None:
        guides = torch.stack([(read_pixels(s.guide, size) + 1) / 2 for s in settings if s.guide is not None]).to(device)
    if clip_scale and seers.clip is not None:
        texts = [str(s.own.get("clip_prompt") or s.prompt) for s in settings]
        found.append(_by_clip(seers.clip, seers.clip.see_texts(texts), clip_scale))
    if image_scale and seers.clip is not None and guides is not None:
        goal = seers.clip.see(functional.interpolate(guides, seers.clip.size, mode="nearest"))
        found.append(_by_clip(seers.clip, goal, image_scale))
    if vgg_scale and seers.vgg is not None and guides is not None:
        found.append(_by_vgg(seers.vgg, seers.vgg.see(guides), vgg_scale))
    return found


def _by_clip(clip: ClipSeer, goal: Tensor, scale: float) -> Loss:
    def loss(pixels: Tensor) -> Tensor:
        seen = clip.see(functional.interpolate(pixels, clip.size, mode="bilinear", align_corners=False))
        # squared spherical distance of unit vectors
        return ((seen - goal).norm(dim=-1) / 2).arcsin().pow(2).mul(2).sum() * scale

    return loss


def _by_vgg(vgg: VggSeer, goal: Tensor, scale: float) -> Loss:
    def loss(pixels: Tensor) -> Tensor:
        return (vgg.see(pixels) - goal).square().flatten(1).mean(1).sum() * scale

    return loss
