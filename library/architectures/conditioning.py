"""The conditions of a denoiser: encoded text, facts about the images, and the residuals of ControlNets.

Shape legend: B batch, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.architectures.ragged import joined


@dataclass
class Conditioning:
    """Encoded text: named tensors with the batch first, e.g. ``context`` (B, T, D)."""

    tensors: dict[str, Tensor]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        moved = {
            name: t.to(device=device, dtype=dtype if dtype is not None and t.is_floating_point() else None)
            for name, t in self.tensors.items()
        }
        return Conditioning(moved)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch; token axes of different lengths are padded with zeros."""
        names = parts[0].tensors.keys()
        return Conditioning({name: joined([p.tensors[name] for p in parts]) for name in names})


@dataclass(frozen=True)
class SampleFacts:
    """Facts about the images of a batch that may condition the denoiser, beside their captions."""

    original: Tensor  # (B, 2) int64, (H, W) of the image in pixels before it was resized
    top_left: Tensor  # (B, 2) int64, (top, left) of the crop in the resized image
    target: Tensor  # (B, 2) int64, (H, W) of what is trained or generated

    @staticmethod
    def of_whole_images(width: int, height: int, count: int) -> SampleFacts:
        """Return the facts of uncropped images of this size in pixels."""
        size = torch.tensor([[height, width]]).expand(count, 2)
        return SampleFacts(size, torch.zeros_like(size), size)


#: the residuals that a ControlNet adds to a prediction: named tensors, or lists of them, for the family's ``predict``
Control = Mapping[str, Any]


@dataclass(frozen=True)
class CaptionLength:
    """The length of a caption for a text encoder."""

    tokens: int  # without start, end and padding
    limit: int  # tokens that are used
    cut: str  # the end of the caption that is cut off; empty if everything fits
