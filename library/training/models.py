"""The models of a run: loaded, or on the meta device with names, shapes and dtypes but without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.architectures.part import DENOISER, text_encoder_name


@dataclass(frozen=True)
class Models:
    """The parts of one model."""

    tokenizers: Sequence[Any]
    text_encoders: Sequence[nn.Module]  # on the meta device where their outputs are cached
    denoiser: nn.Module
    vae: nn.Module | None
    #: for each text encoder, whether its outputs come from a cache
    cached: Sequence[bool] = ()

    @property
    def encoding(self) -> list[nn.Module | None]:
        """Return the text encoders that encode captions in a step; ``None`` for those whose outputs are cached."""
        cached = self.cached or (False,) * len(self.text_encoders)
        return [None if is_cached else m for m, is_cached in zip(self.text_encoders, cached, strict=True)]

    def part(self, name: str) -> nn.Module:
        """Return the denoiser or a text encoder, by its name."""
        if name == DENOISER:
            return self.denoiser
        names = [text_encoder_name(number) for number in range(1, len(self.text_encoders) + 1)]
        return self.text_encoders[names.index(name)]

    def modules(self) -> list[nn.Module]:
        """Return all present models."""
        return [*self.text_encoders, self.denoiser, *([self.vae] if self.vae is not None else [])]

    def named(self) -> list[tuple[str, nn.Module]]:
        """Return the models with names for people."""
        several = len(self.text_encoders) > 1
        encoders = enumerate(self.text_encoders, start=1)
        named = [(f"text encoder {n}" if several else "text encoder", m) for n, m in encoders]
        return [*named, ("denoiser", self.denoiser), *([("VAE", self.vae)] if self.vae is not None else [])]


def load_on_meta(
    architecture: Architecture,
    checkpoint: Any,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    attention: str,
    split_attention: bool = False,
    tokenizers: Sequence[Any] = (),
    cached: Sequence[bool] = (),
) -> Models:
    """Build all models from their files' headers, without weights.

    Raises:
        UserError: headers that lack tensors, or whose shapes do not fit.
    """
    denoiser = architecture.load_denoiser(checkpoint, dtype=dtype, device="meta")
    architecture.set_attention(denoiser, attention, split=split_attention)
    return Models(
        tokenizers=tokenizers,
        text_encoders=architecture.load_text_encoders(checkpoint, dtype=dtype, device="meta"),
        denoiser=denoiser,
        vae=architecture.load_vae(checkpoint, dtype=vae_dtype, device="meta"),
        cached=cached,
    )
