"""ControlNet-LLLite: small networks that read an image and change the inputs of a U-Net's attention layers.

Each adapted ``Linear`` layer has convolutions that turn the image into one vector for each token of the layer, and a
small perceptron that reads it beside the layer's input x: ``layer(x + multiplier * up(mid([image, down(x)])))``.
Training and generating share this module.

Shape legend: B images, R rows of a batch (a multiple of B), T tokens, (H, W) pixels, c features of an image's
embedding, m inner features.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.architectures.common.ldm_unet import ldm_unet_layout
from library.architectures.common.token_grid import token_grid
from library.architectures.lora_target import LORA_TARGET, LoraTarget
from library.errors import UserError
from networks.adapter_module import is_method_of
from networks.targets import FoundModule, find_modules
from networks.weights import read_weights, write_weights

logger = logging.getLogger(__name__)

PREFIX = "lllite_unet"
#: layers that published files adapt: queries, keys and values of self-attention, queries of cross-attention
_LAYERS = re.compile(r"(input_blocks|middle_block)\..*\.(attn1\.to_[qkv]|attn2\.to_q)")
#: (kernel and stride) of the convolutions of an image's embedding, by their depth; they shrink 8, 16 and 32 times
_KERNELS = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}


class LLLiteModule(nn.Module):
    """The network of one layer."""

    def __init__(self, layer: nn.Linear, depth: int, *, cond_emb_dim: int, mlp_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        half, kernels = cond_emb_dim // 2, _KERNELS[depth]
        parts: list[nn.Module] = []
        width = 3
        for place, kernel in enumerate(kernels, start=1):
            outputs = cond_emb_dim if place == len(kernels) else half
            parts += [nn.Conv2d(width, outputs, kernel, kernel), nn.ReLU()]
            width = outputs
        self.conditioning1 = nn.Sequential(*parts[:-1])
        self.down = nn.Sequential(nn.Linear(layer.in_features, mlp_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(mlp_dim + cond_emb_dim, mlp_dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(mlp_dim, layer.in_features))
        nn.init.zeros_(self.up[0].weight)
        nn.init.zeros_(self.up[0].bias)  # so that the model is unchanged at first
        self.dropout = dropout
        self.multiplier = 1.0
        self.stride = 8 * 2 ** (depth - 1)
        self._layer = (layer,)  # in a tuple, because nn.Module would register it as a submodule
        self._original: Callable[..., Tensor] | None = None
        self._embedding: Tensor | None = None  # (B, c, h, w)

    def apply_to_layer(self) -> None:
        """Change the layer's inputs from now on."""
        self._original = self._layer[0].forward
        self._layer[0].forward = self._changed

    def remove_from_layer(self) -> None:
        """Undo ``apply_to_layer``; of several networks on one layer the last one first."""
        assert self._original is not None
        if is_method_of(self._original, self._layer[0]):
            del self._layer[0].forward
        else:
            self._layer[0].forward = self._original
        self._original = None

    def embed(self, images: Tensor | None) -> None:
        """Set the images (B, 3, H, W) in [-1, 1] for the following forward passes; None changes nothing."""
        if images is None:
            self._embedding = None
            return
        # the U-Net's levels round up, so incomplete cells at the right and bottom count
        height, width = images.shape[-2:]
        padding = (0, -width % self.stride, 0, -height % self.stride)
        padded = F.pad(images, padding, mode="replicate") if any(padding) else images
        self._embedding = self.conditioning1(padded)

    def _changed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self._original is not None
        if self._embedding is None or self.multiplier == 0:
            return self._original(x, *args, **kwargs)
        return self._original(x + self.multiplier * self.change(x), *args, **kwargs)

    def change(self, x: Tensor) -> Tensor:
        """Return the change (R, T, in) of inputs x (R, T, in)."""
        assert self._embedding is not None
        embedding, tokens = self._embedding, x.shape[1]
        if embedding.shape[-2] * embedding.shape[-1] != tokens:  # of features that shrink the latents
            grid = token_grid(tokens, *embedding.shape[-2:])
            embedding = F.interpolate(embedding.float(), grid, mode="bilinear", align_corners=False)
        condition = embedding.flatten(2).transpose(1, 2).to(x.dtype)  # (B, c, h, w) -> (B, T, c)
        condition = condition.repeat(len(x) // len(condition), 1, 1)
        hidden = self.mid(torch.cat([condition, self.down(x)], dim=2))
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        return self.up(hidden)


class LLLiteNetwork(nn.Module):
    """A network for each adapted layer, under the names of published files.

    Args:
        sizes: (depth, cond_emb_dim, mlp_dim) by name; None for the published layers of the denoiser with these sizes.

    Raises:
        UserError: the denoiser has no such layers.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        cond_emb_dim: int = 32,
        mlp_dim: int = 64,
        dropout: float = 0.0,
        sizes: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> None:
        super().__init__()
        for found in adapted_layers(denoiser):
            if sizes is None:
                size = (_depth(found, denoiser), cond_emb_dim, mlp_dim)
            elif found.lora_name in sizes:
                size = sizes[found.lora_name]
            else:
                continue
            depth, emb_dim, dim = size
            module = LLLiteModule(found.module, depth, cond_emb_dim=emb_dim, mlp_dim=dim, dropout=dropout)
            self.add_module(found.lora_name, module)

    @property
    def parts(self) -> Sequence[LLLiteModule]:
        return [module for module in self.children() if isinstance(module, LLLiteModule)]

    @staticmethod
    def from_file(path: Path | str, denoiser: nn.Module, *, flag: str, dropout: float = 0.0) -> LLLiteNetwork:
        """Make the network of a file, with its weights.

        Args:
            dropout: of training.
            flag: the option that named the file, for messages.

        Raises:
            UserError: no such file, something else, or a network of another model.
        """
        if not Path(path).is_file():
            raise UserError(f"{flag} {path}: no such file")
        weights = read_weights(path)
        sizes = sizes_in(weights, f"{flag} {path}")
        network = LLLiteNetwork(denoiser, sizes=sizes, dropout=dropout)
        made = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for name, tensor in weights.items():
            if made.get(name) != tuple(tensor.shape):
                raise UserError(
                    f"{flag} {path}: {name} {list(tensor.shape)} fits no layer of this model; it is for another one"
                )
        if missing := made.keys() - weights.keys():
            raise UserError(f"{flag} {path}: {min(missing)} is missing; the file is damaged")
        network.load_state_dict(dict(weights))
        return network

    def apply_to_denoiser(self) -> None:
        for part in self.parts:
            part.apply_to_layer()

    def remove(self) -> None:
        for part in self.parts:
            part.remove_from_layer()

    def set_images(self, images: Tensor | None) -> None:
        """Read images (B, 3, H, W) in [-1, 1]; until the next call they change the layers' inputs, None does not."""
        for part in self.parts:
            part.embed(images)

    def set_multiplier(self, multiplier: float) -> None:
        for part in self.parts:
            part.multiplier = multiplier

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the tensors by the names of published files, atomically."""
        write_weights(file, self.state_dict(), dtype, metadata)


def adapted_layers(denoiser: nn.Module) -> list[FoundModule]:
    """Return the layers that published files adapt, in the model's order.

    In U-Nets of more than three levels, as those of Stable Diffusion 1.x, the middle is left out: the embeddings of
    images, which shrink them 32 times at most, are finer than it.

    Raises:
        UserError: the model has none: it is no U-Net with the original names.
    """
    target: LoraTarget | None = getattr(denoiser, LORA_TARGET, None)
    levels = getattr(denoiser, "down_blocks", ())
    found = []
    if target is not None and levels:
        to_file = target.file_path or ldm_unet_layout(denoiser.config).keys.to_file
        for module in find_modules(denoiser, replace(target, prefix=PREFIX, file_path=to_file)):
            place = to_file(module.path)
            is_coarse = len(levels) > len(_KERNELS) and module.path.startswith("mid_block.")
            if place is not None and _LAYERS.fullmatch(place) and not is_coarse:
                found.append(module)
    if not found:
        raise UserError("ControlNet-LLLite is for the U-Nets of SD 1.x, 2.x and SDXL; this model has no such layers")
    return found


def _depth(found: FoundModule, denoiser: nn.Module) -> int:
    """Return how many convolutions embed an image: 1, 2 and 3 for layers at latents of 1/1, 1/2 and 1/4 size."""
    blocks = denoiser.down_blocks
    levels = len(blocks)
    block = re.match(r"down_blocks\.(\d+)\.", found.path)
    level = int(block[1]) if block else levels - 1
    return min(level, 2) + 1


def sizes_in(weights: Mapping[str, Tensor], what: str) -> dict[str, tuple[int, int, int]]:
    """Return (depth, cond_emb_dim, mlp_dim) of each layer's network in a file, by its name.

    Raises:
        UserError: the file, called ``what``, holds no ControlNet-LLLite, or a part of one.
    """
    names = {name.partition(".")[0] for name in weights}
    if not names or not all(name.startswith(PREFIX) for name in names):
        raise UserError(f"{what}: holds no ControlNet-LLLite (its first tensor is {next(iter(weights), 'none')})")
    sizes = {}
    for name in sorted(names):
        convolutions = [weights.get(f"{name}.conditioning1.{place}.weight") for place in (0, 2, 4)]
        present = [tensor for tensor in convolutions if tensor is not None]
        down = weights.get(f"{name}.down.0.weight")
        if len(present) < 2 or down is None:
            raise UserError(f"{what}: tensors of {name} are missing; the file is damaged")
        depth = 3 if len(present) == 3 else 2 if present[1].shape[-1] == 4 else 1
        sizes[name] = (depth, present[-1].shape[0], down.shape[0])
    return sizes
