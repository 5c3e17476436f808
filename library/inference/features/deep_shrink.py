"""Deep Shrink: smaller features deep in a U-Net during the first steps, against repetition in large images.

As in sd-scripts: before a block of the way down, the features are resized by a ratio; on the way up, they are resized
to the size of each skip connection. All resizing is bicubic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.inference.denoise import WAYS_DOWN, Denoise, Feature, Generation, StepInfo
from library.inference.feature_options.deep_shrink import DECLARATION, PROMPT_OPTIONS, SHRINK_NAMES, DeepShrinkOptions

#: default values if any option of Deep Shrink is given
DEPTH, TIMESTEPS, RATIO = 3, 650, 0.5


class DeepShrink(Feature):
    """Shrink before one block until a timestep, then before another block until a second timestep."""

    order = 10
    declaration = DECLARATION
    prompt_options = PROMPT_OPTIONS

    def __init__(self) -> None:
        self._generation: Generation | None = None
        self._depths: list[int] = []
        self._until: list[int] = []
        self._ratio = 1.0

    @classmethod
    def is_wanted(cls, settings: ImageSettings) -> bool:
        """Whether anything of it is given."""
        return any(settings.own.get(name) is not None for name in SHRINK_NAMES)

    @classmethod
    def given(cls, options: Any) -> Mapping[str, Any]:
        given: DeepShrinkOptions = options.deep_shrink
        return vars(given) if given.ds_depth_1 is not None else {}

    def prepare(self, generation: Generation) -> None:
        unet = generation.models.denoiser
        assert unet is not None
        points = generation.models.architecture.shrink_points(unet)
        usual = {"ds_depth_1": DEPTH, "ds_timesteps_1": TIMESTEPS, "ds_timesteps_2": TIMESTEPS, "ds_ratio": RATIO}
        given = {name: value for name, value in generation.first.own.items() if value is not None}
        asked: Mapping[str, Any] = {**usual, **given}
        depths = [asked["ds_depth_1"]] + ([asked["ds_depth_2"]] if "ds_depth_2" in asked else [])
        for depth in depths:
            if not 0 <= depth < len(points):
                raise UserError(f"Deep Shrink: depth {depth}: this model has depths 0 to {len(points) - 1}")
        self._generation = generation
        self._depths = depths
        self._until = [asked["ds_timesteps_1"], asked["ds_timesteps_2"]]
        self._ratio = asked["ds_ratio"]

    def wrap(self, denoise: Denoise) -> Denoise:
        def shrunk(noisy: Tensor, timesteps: Tensor, step: StepInfo) -> Tensor:
            depth = self._depth(float(step.timestep))
            if depth is None or self._generation is None:
                return denoise(noisy, timesteps, step)
            models = self._generation.models
            assert models.denoiser is not None
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(shrinking(models.denoiser, self._place(models.denoiser, depth), self._ratio))
                for module in self._generation.facts.get(WAYS_DOWN, ()):  # so that their outputs fit
                    hooks.enter_context(shrinking_input(self._place(module, depth), self._ratio))
                    if depth == 0 and (hint := getattr(module, "controlnet_cond_embedding", None)) is not None:
                        hooks.enter_context(resizing_output(hint, self._place(module, depth), self._ratio))
                prediction = denoise(noisy, timesteps, step)
            return _resized(prediction, noisy)

        return shrunk

    def _place(self, module: nn.Module, depth: int) -> nn.Module:
        assert self._generation is not None
        return self._generation.models.architecture.shrink_points(module)[depth]

    def _depth(self, timestep: float) -> int | None:
        if timestep >= self._until[0]:
            return self._depths[0]
        if len(self._depths) > 1 and timestep >= self._until[1]:
            return self._depths[1]
        return None


@contextlib.contextmanager
def shrinking(unet: nn.Module, place: nn.Module, ratio: float) -> Iterator[None]:
    """Resize the features that reach a module of a diffusers U-Net by ``ratio``, and back at each skip connection."""
    blocks: list[Any] = list(unet.up_blocks)
    with shrinking_input(place, ratio):
        try:
            for block in blocks:
                block.forward = partial(_up, block)
            yield
        finally:
            for block in blocks:
                del block.forward


@contextlib.contextmanager
def shrinking_input(place: nn.Module, ratio: float) -> Iterator[None]:
    """Resize the features that reach a module by ``ratio``."""

    def shrink(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_scaled(args[0], ratio), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _scaled(kwargs["hidden_states"], ratio)}

    hook = place.register_forward_pre_hook(shrink, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def resizing_output(module: nn.Module, place: nn.Module, ratio: float) -> Iterator[None]:
    """Resize a ControlNet's embedding of its image, which is added behind the first convolution, if that is shrunk."""
    if not isinstance(place, nn.Conv2d):
        yield
        return
    hook = module.register_forward_hook(lambda _module, _args, output: _scaled(output, ratio))
    try:
        yield
    finally:
        hook.remove()


def _up(
    block: Any,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    upsample_size: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The forward pass of ``UpBlock2D`` and ``CrossAttnUpBlock2D``, resizing to each skip connection."""
    skips = list(res_hidden_states_tuple)
    attentions = getattr(block, "attentions", [None] * len(block.resnets))
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        skip = skips.pop()
        hidden_states = resnet(torch.cat([_resized(hidden_states, skip), skip], dim=1), temb)
        if attention is not None:
            hidden_states = attention(
                hidden_states, encoder_hidden_states=encoder_hidden_states, return_dict=False, **kwargs
            )[0]
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states)
    return hidden_states


def _scaled(features: Tensor, ratio: float) -> Tensor:
    size = [max(int(side * ratio), 1) for side in features.shape[-2:]]
    return functional.interpolate(features.float(), size, mode="bicubic", align_corners=False).to(features.dtype)


def _resized(features: Tensor, like: Tensor) -> Tensor:
    if features.shape[-2:] == like.shape[-2:]:
        return features
    return functional.interpolate(features.float(), like.shape[-2:], mode="bicubic", align_corners=False).to(
        features.dtype
    )
