"""Gradual Latent: small latents at first, which grow to the size of the image from step to step.

An image's composition is decided early, at a size near that of the training; its details come later. The step is that
of ancestral Euler sampling, and growth happens within it.

Shape legend: B images, C latent channels, (h, w) size of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteScheduler,
    EulerAncestralDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.denoise import Feature, Generation, StepInfo
from library.inference.feature_options.gradual_latent import (
    DECLARATION,
    PROMPT_OPTIONS,
    SAMPLERS,
    START,
    GradualLatentOptions,
    read_unsharp,
)

#: sides of growing latents are multiples of this many cells
_CELLS = 8


class GradualLatent(Feature):
    """Start with small latents, and grow them every few steps below a timestep."""

    order = 60
    prompt_options = PROMPT_OPTIONS
    declaration = DECLARATION

    def __init__(self) -> None:
        self._size = (0, 0)  # (h, w) at the end

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether anything of it is given."""
        return any(option.field in settings.own for option in PROMPT_OPTIONS)

    @classmethod
    def given(cls, options: Any) -> Mapping[str, Any]:
        given: GradualLatentOptions = options.gradual_latent
        if given.gradual_latent_timesteps is None:
            return {}
        found = {name: value for name, value in vars(given).items() if value is not None}
        if given.gradual_latent_unsharp_params is not None:
            found["gradual_latent_unsharp_params"] = read_unsharp(given.gradual_latent_unsharp_params)
        return found

    def prepare(self, generation: Generation) -> None:
        first, own = generation.first, dict(generation.first.own)
        if first.sampler not in SAMPLERS:
            raise UserError(f"Gradual Latent works with the sampler euler_a alone, not with {first.sampler}")
        if first.mask is not None:
            raise UserError("Gradual Latent cannot be combined with a mask, whose kept part has no smaller latents")
        usual = GradualLatentOptions()
        values = {
            **vars(usual),
            "gradual_latent_timesteps": START,
            **{k: v for k, v in own.items() if k in vars(usual)},
        }
        self._size = (generation.latents.shape[-2], generation.latents.shape[-1])
        growth = Growth(
            self._size,
            below=values["gradual_latent_timesteps"],
            ratio=values["gradual_latent_ratio"],
            step=values["gradual_latent_ratio_step"],
            every=max(values["gradual_latent_every_n_steps"], 1),
            noise=values["gradual_latent_s_noise"],
            unsharp=values["gradual_latent_unsharp_params"],
        )
        generation.scheduler = GrowingEulerAncestral.of(generation.scheduler, growth)
        if values["gradual_latent_ratio"] < 1:
            generation.latents = growth.sharpened(_resized(generation.latents, growth.size))

    def after_step(self, latents: Tensor, step: StepInfo) -> Tensor:
        if step.following is None and latents.shape[-2:] != self._size:
            return _resized(latents, self._size)  # too few steps were left
        return latents


class Growth:
    """The size of latents from step to step.

    Args:
        size: (h, w) at the end.
        below: timestep below which they grow.
        ratio: their share of the sides at first.
        step: by how much the share grows.
        every: steps between two growths.
        noise: factor of the noise in a step of growth.
        unsharp: (size, sigma, strength, target); None does not sharpen.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        below: int,
        ratio: float,
        step: float,
        every: int,
        noise: float,
        unsharp: tuple[float, ...] | None,
    ) -> None:
        self._full, self._below, self._ratio, self._step, self._every = size, below, ratio, step, every
        self.noise, self._unsharp = noise, unsharp
        self._since: int | None = None  # steps since the last growth

    @property
    def size(self) -> tuple[int, int]:
        """Return the present (h, w)."""
        if self._ratio >= 1:
            return self._full
        height, width = (max(int(side * self._ratio) // _CELLS * _CELLS, _CELLS) for side in self._full)
        return min(height, self._full[0]), min(width, self._full[1])

    @property
    def after_step(self) -> bool:
        """Whether latents grow behind the step, and not before it."""
        return self._unsharp is None or bool(self._unsharp[3])

    def grows(self, timestep: float) -> bool:
        """Whether latents grow in the step at this timestep; asked once for each step."""
        self._since = None if self._since is None else self._since + 1
        if timestep >= self._below or self._ratio >= 1 or (self._since is not None and self._since < self._every):
            return False
        self._ratio, self._since = min(self._ratio + self._step, 1.0), 0
        return True

    def sharpened(self, latents: Tensor) -> Tensor:
        """Return latents with an unsharp mask."""
        if self._unsharp is None:
            return latents
        kernel, sigma, strength, _ = self._unsharp
        return latents + strength * (latents - _blurred(latents, int(kernel), sigma))


class GrowingEulerAncestral(EulerAncestralDiscreteScheduler):
    """Ancestral Euler steps in which latents grow (Karras et al. 2022, arXiv:2206.00364; k-diffusion's euler_a)."""

    growth: Growth

    @staticmethod
    def of(scheduler: Any, growth: Growth) -> GrowingEulerAncestral:
        """Return a scheduler in the state of another."""
        made = GrowingEulerAncestral.from_config(scheduler.config)
        made.__dict__.update(scheduler.__dict__)
        made.growth = growth
        return made

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, following = (self.sigmas[self.step_index + place] for place in (0, 1))
        if self.config.prediction_type == "v_prediction":
            start = model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
        else:
            start = sample - sigma * model_output
        up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        derivative = (sample - start) / sigma
        grows, growth = self.growth.grows(float(timestep)), self.growth
        if grows and not growth.after_step:
            sample = growth.sharpened(_resized(sample, growth.size))
            derivative = _resized(derivative, growth.size)
        sample = sample + derivative * (down - sigma)
        if grows and growth.after_step:
            sample = growth.sharpened(_resized(sample, growth.size))
        noise = randn_tensor(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
        sample = sample + noise * up * (growth.noise if grows else 1.0)
        self._step_index += 1
        return EulerAncestralDiscreteSchedulerOutput(sample, start) if return_dict else (sample,)


def _resized(latents: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(latents.float(), size, mode="bicubic", align_corners=False).to(latents.dtype)


def _blurred(latents: Tensor, kernel: int, sigma: float) -> Tensor:
    """Return latents (B, C, h, w) behind a Gaussian of ``kernel`` cells."""
    places = torch.arange(kernel, dtype=torch.float32, device=latents.device) - kernel // 2
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(latents.dtype)
    channels, half = latents.shape[1], kernel // 2
    padded = functional.pad(
        latents, (half, half, half, half), mode="reflect" if min(latents.shape[-2:]) > half else "replicate"
    )
    across = functional.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(across, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
