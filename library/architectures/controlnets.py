"""The interface of families with ControlNets, beside ``Architecture``, for training and applying them.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv:2302.05543).

Shape legend: B images, C latent channels, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common.loading import ModelSource
from library.architectures.conditioning import Conditioning, Control

#: ways to save a ControlNet: one file by the family's usual names; one by the original names below ``control_model.``;
#: a folder of diffusers
PUBLISHED, PREFIXED, DIFFUSERS = "published", "control_model", "diffusers"


class HasControlNets(ABC):
    """A family whose ControlNets are trained."""

    #: of the above, how this family's ControlNets can be saved
    controlnet_layouts: tuple[str, ...] = (PUBLISHED, DIFFUSERS)

    @abstractmethod
    def controlnet_source(self, path_or_id: str, checkpoint: Any, *, flag: str) -> ModelSource:
        """Return the ControlNet in a file, a folder or a Hub repository, from its header.

        Raises:
            UserError: nothing there, something else, or a ControlNet of another model; ``flag`` named it.
        """

    @abstractmethod
    def load_controlnet(self, source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
        """Load a ControlNet, frozen, in eval mode."""

    @abstractmethod
    def new_controlnet(self, checkpoint: Any, *, device: str) -> nn.Module:
        """Return a ControlNet in float32 that starts from the weights of the denoiser's file and changes nothing yet.

        New layers are drawn from torch's global generator. On the meta device there are no weights.
        """

    @abstractmethod
    def control_image(self, pixels: Tensor) -> Tensor:
        """Return an image (B, 3, H, W) in [-1, 1] in the range that ControlNets of this family read."""

    @abstractmethod
    def control(
        self,
        controlnet: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        image: Tensor,
        *,
        weight: float = 1.0,
    ) -> Control:
        """Return what a ControlNet adds to ``predict``.

        Args:
            noisy: (B, C, h, w), as ``predict`` is given it, and the next two.
            image: of ``control_image``.
            weight: factor of all outputs.
        """

    @abstractmethod
    def set_controlnet_attention(self, controlnet: nn.Module, backend: str, *, split: bool = False) -> None:
        """Choose how a ControlNet attends, see ``Architecture.set_attention``."""

    @abstractmethod
    def write_controlnet(
        self,
        path: Path,
        controlnet: nn.Module,
        layout: str,
        checkpoint: Any,
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
    ) -> None:
        """Write a ControlNet, completely or not at all.

        Args:
            path: a file, or with ``DIFFUSERS`` a folder.
            layout: one of ``controlnet_layouts``.
            dtype: cast floating-point tensors to it; ``None`` keeps each one's own.
        """
