"""Models that see images: CLIP and VGG16, for guidance and conditioning.

Shape legend: B images, (H, W) pixels, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.architectures.common.emphasis import parse_emphasis
from library.errors import UserError
from library.memory.placing import move

#: Hub repositories of the published programs
CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
BIG_CLIP = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
#: means and deviations of the training images
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _normed(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)


@dataclass(frozen=True)
class ClipSeer:
    """A CLIP model with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W) of the images that it reads."""
        side = self.model.config.vision_config.image_size
        return side, side

    def see(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, F) of images (B, 3, H, W) in [0, 1], of its size."""
        states = self.model.vision_model(pixel_values=_normed(pixels, _CLIP_MEAN, _CLIP_STD)).pooler_output
        return functional.normalize(self.model.visual_projection(states), dim=-1)

    def see_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (B, F) of texts, without their emphasis; of long ones the end counts."""
        found = []
        for text in texts:
            plain = "".join(piece for piece, _ in parse_emphasis(text))
            tokens = self.tokenizer(plain).input_ids
            limit = self.model.config.text_config.max_position_embeddings
            tokens = tokens if len(tokens) <= limit else [tokens[0], *tokens[1 - limit :]]
            ids = torch.tensor([tokens], device=self.model.device)
            states = self.model.text_model(input_ids=ids).last_hidden_state
            found.append(self.model.text_projection(states[:, -1]))  # the end token's
        return functional.normalize(torch.cat(found), dim=-1)


@dataclass(frozen=True)
class VggSeer:
    """The first layers of VGG16."""

    layers: nn.Module

    def see(self, pixels: Tensor) -> Tensor:
        """Return the features of images (B, 3, H, W) in [0, 1], at a quarter of their sides."""
        size = [max(side // 4, 1) for side in pixels.shape[-2:]]
        small = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        return self.layers(_normed(small, _IMAGENET_MEAN, _IMAGENET_STD))


def load_clip(device: torch.device, name: str = CLIP) -> ClipSeer:
    """Load a CLIP model from the Hub, or its cache.

    Raises:
        UserError: it cannot be downloaded.
    """
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model, tokenizer = CLIPModel.from_pretrained(name), CLIPTokenizer.from_pretrained(name)
    except OSError as error:
        raise UserError(f"CLIP guidance: {name} is not here, and cannot be downloaded ({_first_line(error)})") from None
    return ClipSeer(move(model, device).eval().requires_grad_(False), tokenizer)


def load_clip_vision(device: torch.device, name: str = BIG_CLIP) -> Any:
    """Load the half of a CLIP model that sees images. Raises UserError: it cannot be downloaded."""
    from transformers import CLIPVisionModelWithProjection

    try:
        model = CLIPVisionModelWithProjection.from_pretrained(name)
    except OSError as error:
        raise UserError(
            f"--clip_vision_strength: {name} is not here, and cannot be downloaded ({_first_line(error)})"
        ) from None
    return move(model, device).eval().requires_grad_(False)


def load_vgg16(layer: int, device: torch.device) -> VggSeer:
    """Load VGG16 up to a layer, from 0.

    Raises:
        UserError: torchvision is not installed, or the weights cannot be downloaded.
    """
    try:
        from torchvision.models import VGG16_Weights, vgg16
    except ImportError:
        raise UserError("--vgg16_guidance_scale needs the package torchvision; pip install torchvision") from None
    try:
        features = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features[: layer + 1]
    except OSError as error:
        raise UserError(
            f"--vgg16_guidance_scale: VGG16 is not here, and cannot be downloaded ({_first_line(error)})"
        ) from None
    return VggSeer(move(features, device).eval().requires_grad_(False))


def clip_pixels(pixels: Tensor, size: int) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] as a CLIP of this size reads them: resized, and the middle cut out."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    resized = [max(round(side * scale), size) for side in (height, width)]
    pixels = functional.interpolate(pixels, resized, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in resized)
    return _normed(pixels[..., top : top + size, left : left + size], _CLIP_MEAN, _CLIP_STD)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
