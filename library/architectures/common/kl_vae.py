"""The KL autoencoder: names in original (LDM) files and in diffusers, its configuration, encoding and decoding.

Shape legend: B batch, C latent channels, (h, w) latent size, (H, W) pixels, H = 8h, W = 8w.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.common.expected import check_count
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LDM_PREFIX = "first_stage_model."
#: bounds of the log variance, as in the published autoencoder
LOG_VARIANCE_RANGE = (-30.0, 20.0)

#: (LDM, diffusers) names of the middle block, below "encoder." and "decoder."
MIDDLE = (
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
)
OUTER = (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
#: the middle block's attention in Diffusers files written before attention was unified (v0.17), and now
OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
CONV_LINEARS = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


def ldm_vae_layout(config: Mapping[str, Any], *, prefix: str = LDM_PREFIX) -> TensorLayout:
    """The LDM layout; LDM numbers the decoder's levels from the image, diffusers from the latents."""
    levels, layers = len(config["block_out_channels"]), int(config["layers_per_block"])

    def resnet(ldm: str, diffusers: str) -> list[tuple[str, str]]:
        return [(ldm, diffusers), (f"{ldm}.nin_shortcut", f"{diffusers}.conv_shortcut")]

    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.{a}", f"{side}.{b}") for a, b in OUTER + MIDDLE]
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            pairs += resnet(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}")
        for layer in range(layers + 1):
            pairs += resnet(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}")
        if level < levels - 1:
            pairs.append((f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        if level > 0:
            pairs.append((f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    return TensorLayout(KeyMap(pairs), prefix, conv_linears=CONV_LINEARS)


def diffusers_vae_layout(names: Mapping[str, object], *, prefix: str = "") -> TensorLayout:
    """Diffusers' own names; the attention's older names are accepted."""
    pairs = [(part, part) for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")]
    if any(name.endswith(".mid_block.attentions.0.query.weight") for name in names):
        for side in ("encoder", "decoder"):
            attention = f"{side}.mid_block.attentions.0"
            pairs += [(f"{attention}.{old}", f"{attention}.{new}") for old, new in OLD_ATTENTION]
    return TensorLayout(KeyMap(pairs), prefix, conv_linears=CONV_LINEARS)


_UP_LEVEL = re.compile(r"decoder\.(?:up\.(\d+)|up_blocks\.(\d+))\.")


def infer_vae_config(shapes: Mapping[str, tuple[int, ...]], *, prefix: str = LDM_PREFIX) -> dict[str, Any]:
    """The diffusers configuration of an autoencoder file with LDM or diffusers names, from names and shapes alone.

    Raises:
        UserError: the names do not add up to an autoencoder.
    """
    shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}
    sizes = infer_sizes(shapes, _DOWN_BLOCK, _UP_LEVEL)
    levels = len(sizes["block_out_channels"])
    return {
        **sizes,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


_DOWN_BLOCK = re.compile(r"encoder\.(?:down\.(\d+)\.block|down_blocks\.(\d+)\.resnets)\.(\d+)\.conv1\.weight")


def infer_sizes(
    shapes: Mapping[str, tuple[int, ...]], down_block: re.Pattern[str], up_level: re.Pattern[str]
) -> dict[str, Any]:
    """The entries of a diffusers configuration on the sizes of an autoencoder with levels of ResNet blocks.

    Args:
        down_block: of the first convolutions of the encoder's blocks; its groups are the level, in one of several
            spellings, and the number of the block in it.
        up_level: of the decoder's tensors; its groups are the level, in one of several spellings.

    Raises:
        UserError: the names do not add up to an autoencoder.
    """
    widths: dict[int, int] = {}
    layers = 0
    for name, shape in shapes.items():
        if found := down_block.fullmatch(name):
            *level, block = found.groups()
            widths[int(next(filter(None, level)))] = shape[0]
            layers = max(layers, int(block) + 1)
    latent = shapes.get("decoder.conv_in.weight")
    if not widths or sorted(widths) != list(range(len(widths))) or latent is None:
        raise UserError("the VAE's tensors are incomplete; download the file again")
    ups = {next(filter(None, found.groups())) for name in shapes if (found := up_level.match(name))}
    check_count("VAE", "levels in its decoder", len(ups), len(widths))
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent[1],
        "block_out_channels": tuple(widths[level] for level in sorted(widths)),
        "layers_per_block": layers,
    }


def build_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


def encode_images(vae: nn.Module, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw latents from the posterior, image by image (Kingma & Welling 2014, eq. 10: z = mean + std * noise).

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        generators: one per image; the noise does not depend on the batch.

    Returns:
        (B, C, h, w) unscaled latents, float32.
    """
    weight = next(vae.parameters())
    with _in_its_dtype(weight):
        moments = vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist.parameters  # (B, 2C, h, w)
    mean, log_variance = moments.float().chunk(2, dim=1)  # (B, C, h, w) each
    std = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE))
    noise = torch.stack([torch.randn(mean.shape[1:], generator=g, device=g.device) for g in generators])
    if mean.is_cuda and noise.device.type == "cpu":
        noise = noise.pin_memory()  # a copy from pinned memory does not wait, so the next batch can be queued
    return mean + std * noise.to(mean.device, non_blocking=True)


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """(B, C, h, w) unscaled latents -> (B, 3, H, W) pixels in [-1, 1], float32."""
    weight = next(vae.parameters())
    with _in_its_dtype(weight):
        return vae.decode(latents.to(weight.device, weight.dtype)).sample.float().clamp(-1, 1)


def _in_its_dtype(weight: Tensor) -> torch.autocast:
    """Return a context in which autocast changes nothing: a VAE in float32 (``--no_half_vae``) overflows in half."""
    return torch.autocast(weight.device.type, enabled=False)
