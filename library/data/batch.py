"""The input of a step: several samples of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Samples of one dataset and bucket, with either ``latents`` or ``images``.

    Shape legend: B samples, C latent channels, (h, w) latent size, (H, W) bucket size.
    """

    latents: Tensor | None  # (B, C, h, w) float32, as caches store them
    images: Tensor | None  # (B, 3, H, W) float32 in [-1, 1]
    loss_masks: Tensor | None  # (B, H, W) float32 in [0, 1], loss weight of each pixel; None: all are 1
    conditioning_images: Tensor | None  # (B, 3, H, W) float32 in [-1, 1], for trainers that condition on images
    captions: list[str]
    tokens: dict[str, Tensor]  # batch first; stay on the host until they are encoded
    visits: list[int]  # keys of all randomness of a sample, see library.randomness
    loss_weights: Tensor  # (B,)
    paths: list[str]
    bucket: tuple[int, int]  # (W, H)
    original_sizes: Tensor  # (B, 2) int64, (H, W) of the images
    crop_top_lefts: Tensor  # (B, 2) int64, (top, left) of the crop in the resized and maybe mirrored image
    flipped: list[bool]
    network_multiplier: float = 1.0
    #: conditioning from a cache, batch first; tokens are there then only if some encoders are trained
    text: dict[str, Tensor] | None = None
    #: of each sample's subset, for scripts and network modules of other projects; nothing here reads them
    custom_attributes: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def target_sizes(self) -> Tensor:
        """Return the bucket's (H, W), (B, 2) int64."""
        return torch.tensor([self.bucket[::-1]]).expand(len(self.captions), 2)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return a copy whose samples are on ``device``; tokens stay on the host."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            latents=move(self.latents),
            images=move(self.images),
            loss_masks=move(self.loss_masks),
            conditioning_images=move(self.conditioning_images),
            loss_weights=self.loss_weights.to(device, non_blocking=non_blocking),
            original_sizes=move(self.original_sizes),
            crop_top_lefts=move(self.crop_top_lefts),
            text=None if self.text is None else {name: move(tensor) for name, tensor in self.text.items()},
        )

    def pin_memory(self) -> Batch:
        """Pin the tensors; called by the loader, so that copies to the device need not wait."""

        def pin(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(
            self,
            latents=pin(self.latents),
            images=pin(self.images),
            loss_masks=pin(self.loss_masks),
            conditioning_images=pin(self.conditioning_images),
            tokens={name: tensor.pin_memory() for name, tensor in self.tokens.items()},
            loss_weights=self.loss_weights.pin_memory(),
            original_sizes=pin(self.original_sizes),
            crop_top_lefts=pin(self.crop_top_lefts),
            text=None if self.text is None else {name: tensor.pin_memory() for name, tensor in self.text.items()},
        )
