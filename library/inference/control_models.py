"""The models that read guide images, ControlNets and ControlNet-LLLites, and the images that they read.

Shape legend: B images, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.data.image_io import opencv
from library.inference.denoise import Generation, StepInfo
from library.inference.feature_options.control_net import ControlOptions, read_preparation
from library.inference.sources import read_pixels, warn_if_stretched


@dataclass(frozen=True)
class ControlModel:
    """One loaded ControlNet or ControlNet-LLLite, and how it is used."""

    model: nn.Module
    weight: float = 1.0
    until: float = 1.0  # share of the steps
    canny: tuple[int, int] | None = None  # thresholds, for images that edges are drawn from

    def acts(self, step: StepInfo) -> bool:
        """Whether it acts in a step."""
        return step.index / step.count <= self.until


def used_as_given(models: Sequence[nn.Module], given: ControlOptions) -> list[ControlModel]:
    """Return models with their strengths, shares of the steps and preparations; the usual ones where none are given."""

    def values(found: Sequence[Any] | None, usual: Any) -> list[Any]:
        return [*(found or []), *[usual] * (len(models) - len(found or []))]

    weights, ratios = values(given.control_net_multipliers, 1.0), values(given.control_net_ratios, 1.0)
    preparations = [read_preparation(text) for text in values(given.control_net_preps, "none")]
    return [ControlModel(*one) for one in zip(models, weights, ratios, preparations, strict=False)]


def control_images(generation: Generation, models: Sequence[ControlModel]) -> list[Tensor]:
    """Return the images (B, 3, H, W) in [-1, 1] that each model reads, of the size that is generated."""
    first = generation.first
    size = first.width, first.height
    return [
        torch.stack([_prepared(one.control[n], size, model) for one in generation.settings if one.control])
        .to(generation.noise)
        for n, model in enumerate(models)
    ]  # fmt: skip


def _prepared(path: Path, size: tuple[int, int], model: ControlModel) -> Tensor:
    warn_if_stretched(path, size)
    pixels = read_pixels(path, size, background="black")  # as in training
    return pixels if model.canny is None else edges(pixels, *model.canny)


def edges(pixels: Tensor, low: int, high: int) -> Tensor:
    """Return white edges on black of an image, both (3, H, W) in [-1, 1] (Canny 1986)."""
    cv2 = opencv()
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    found = cv2.Canny(cv2.cvtColor(np.ascontiguousarray(levels), cv2.COLOR_RGB2GRAY), low, high)
    return torch.from_numpy(found).float().div(127.5).sub(1).expand(3, -1, -1)
