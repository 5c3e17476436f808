"""The autoencoder of HunyuanImage-2.1: diffusers' ``AutoencoderKLHunyuanImage``, loaded from the published file.

It maps 32 by 32 pixels to one cell of 64 channels. Convolutions may run in pieces of the height, and the decoder in
tiles of the image; both take less memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.architectures.common.checkpoint import locate
from library.architectures.common.diffusers_folder import read_json
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.kl_vae import infer_sizes
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.recognise import what_it_is
from library.architectures.common.sharded_file import open_weights
from library.architectures.common.sources import in_file
from library.architectures.common.tensor_files import Shapes, WeightFile
from library.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanImage

CHANNELS, STRIDE = 64, 32
#: the transformer sees latents * SCALE
SCALE = 0.75289
#: side of a tile in pixels, as published; neighbours share a quarter of it
TILE = 384

_MIDDLE = (
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.proj"),
)


# ---- files ----


def vae_source(path_or_id: str) -> ModelSource:
    """Return the autoencoder of ``--vae``: the published file, or a Diffusers folder.

    Raises:
        UserError: nothing there, no autoencoder in it, or one of another family.
    """
    path = locate(path_or_id, flag="--vae", components=("vae", ""))
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        file = open_weights(path)
        config = {name: value for name, value in read_json(path / "config.json").items() if not name.startswith("_")}
        return ModelSource("VAE", file, TensorLayout(KeyMap((side, side) for side in ("encoder", "decoder"))), config)
    return in_file(path, _published, open_weights(path))


def _published(file: WeightFile) -> ModelSource:
    if "encoder.down.0.downsample.conv.weight" not in file.shapes or "encoder.conv_in.weight" not in file.shapes:
        what = what_it_is(file.shapes.keys(), "hunyuan_image_vae", "encoder.conv_in.weight")
        raise UserError(f"not the VAE of HunyuanImage-2.1 ({what}); give hunyuan_image_2.1_vae_fp16.safetensors")
    config = infer_config(file.shapes)
    if config["latent_channels"] != CHANNELS or config["spatial_compression_ratio"] != STRIDE:
        raise UserError(
            f"this VAE has {config['latent_channels']} latent channels for {config['spatial_compression_ratio']} "
            f"pixels, HunyuanImage-2.1 needs {CHANNELS} for {STRIDE}; give hunyuan_image_2.1_vae_fp16.safetensors"
        )
    return ModelSource("VAE", file, published_layout(config), config)


_DOWN_BLOCK = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
_UP_LEVEL = re.compile(r"decoder\.up\.(\d+)\.")


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """Return diffusers' configuration of a published file, from names and shapes alone.

    Raises:
        UserError: the names do not add up to an autoencoder.
    """
    sizes = infer_sizes(shapes, _DOWN_BLOCK, _UP_LEVEL)
    return {
        **sizes,
        "spatial_compression_ratio": 2 ** (len(sizes["block_out_channels"]) - 1),
        "sample_size": TILE,
        "scaling_factor": SCALE,
    }


def published_layout(config: Mapping[str, Any]) -> TensorLayout:
    """Return the published layout; diffusers numbers blocks and resampling of all levels in one list."""
    return TensorLayout(KeyMap(_pairs(len(config["block_out_channels"]), int(config["layers_per_block"]))))


def _pairs(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    for side in ("encoder", "decoder"):
        for name in ("conv_in", "norm_out", "conv_out"):
            yield f"{side}.{name}", f"{side}.{name}"
        for published, ours in _MIDDLE:
            yield f"{side}.{published}", f"{side}.{ours}"
    for side, way, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        for level in range(levels):
            first = level * (count + 1)
            for layer in range(count):
                published, ours = f"{side}.{way}.{level}.block.{layer}", f"{side}.{way}_blocks.{first + layer}"
                yield published, ours
                yield f"{published}.nin_shortcut", f"{ours}.conv_shortcut"
            if level < levels - 1:
                yield f"{side}.{way}.{level}.{way}sample", f"{side}.{way}_blocks.{first + count}"


# ---- models ----


def build_vae(config: Mapping[str, Any]) -> AutoencoderKLHunyuanImage:
    from diffusers import AutoencoderKLHunyuanImage

    return AutoencoderKLHunyuanImage.from_config(dict(config))


def load_vae(source: ModelSource, *, dtype: torch.dtype, device: str, chunk_size: int | None = None) -> nn.Module:
    """Load the autoencoder, frozen, in eval mode.

    Args:
        chunk_size: rows that a convolution computes at once; ``None`` for all.
    """
    vae = load_frozen(source, partial(build_vae, source.config), dtype=dtype, device=device)
    if chunk_size:
        split_convolutions(vae, chunk_size)
    return vae


class ChunkedConv2d(nn.Conv2d):
    """A 3x3 convolution that computes at most ``chunk`` rows at once, whatever the height."""

    chunk: int

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        if height <= self.chunk:
            return super().forward(x)
        sides, edge = (self.padding[1], self.padding[1]), self.padding[0]
        pieces = []
        for start in range(0, height, self.chunk):
            stop = min(start + self.chunk, height)
            above, below = min(edge, start), min(edge, height - stop)  # rows of neighbours; zeros beyond the image
            piece = F.pad(x[:, :, start - above : stop + below], (*sides, edge - above, edge - below))
            pieces.append(F.conv2d(piece, self.weight, self.bias))
        return torch.cat(pieces, dim=2)


def split_convolutions(vae: nn.Module, chunk_size: int) -> None:
    """Let all 3x3 convolutions compute at most ``chunk_size`` rows at once; the results are the same."""
    for module in vae.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            module.__class__ = ChunkedConv2d
            module.chunk = chunk_size
