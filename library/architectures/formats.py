"""The formats in which a family's latents and encoded captions are computed and cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LatentFormat:
    """The shape, scale and file format of a family's latents."""

    channels: int
    stride: int  # pixels per latent cell, the same in both directions
    scale: float  # the denoiser sees (latents - shift) * scale
    shift: float
    cache_suffix: str  # "_sd.npz"; see facts on cache files
    multi_resolution: bool  # whether a cache file holds several sizes under suffixed keys
    stored_scaled: bool = False  # whether cache files hold latents with shift and scale applied
    bucket_step: int = 8  # bucket sides must be multiples of this many pixels


@dataclass(frozen=True)
class TextFormat:
    """The file format of a family's encoded captions."""

    cache_suffix: str  # "_te_outputs.npz"; see facts on cache files
    arrays: Mapping[str, tuple[str, ...]]  # tensors of the conditioning and their axes without the batch
    #: names of the family's own options that they depend on
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: makes further arrays, which other programs read, from the tensors of one caption
    extras: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    #: tensors, of tokens and conditioning, that are as long as their caption: name -> their mask; see ``ragged.py``
    ragged: Mapping[str, str] = field(default_factory=dict)
    #: the lengths that files have of some of them all the same, for other programs
    stored_lengths: Mapping[str, int] = field(default_factory=dict)
