"""The common part of families with an LDM U-Net, CLIP text encoders and a KL autoencoder: SD 1.x, 2.x and SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.architectures.base import (
    LORA_TARGET,
    Architecture,
    BlockNumbering,
    CaptionLength,
    Control,
    LoraTarget,
    ModelInfo,
)
from library.architectures.common import clip, clip_text, kl_vae, ldm_unet
from library.architectures.common.checkpoint import vae_identity
from library.architectures.common.loading import ModelSource, load_frozen

if TYPE_CHECKING:
    from library.diffusion.ddpm import NoiseSchedule
    from library.diffusion.objective import Objective

#: classes of transformers that carry adapters
CLIP_MODULES = ("CLIPAttention", "CLIPMLP")


def unet_target(blocks: BlockNumbering) -> LoraTarget:
    """Return the target of a diffusers U-Net: its attention blocks, and with 3x3 convolutions its ResNet blocks too."""
    convs = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
    return LoraTarget(
        "lora_unet",
        ("Transformer2DModel",),
        conv_classes=convs,
        blocks=blocks,
        diffusers_root="unet",
        attention_classes=("Attention",),
    )


def unet_control(control: Control | None) -> dict[str, Any]:
    """Return ControlNet residuals as arguments of a diffusers U-Net: ``down``, a list, and ``mid``, of (B, D, h, w)."""
    if control is None:
        return {}
    return {
        "down_block_additional_residuals": tuple(control["down"]),
        "mid_block_additional_residual": control["mid"],
    }


class HasUnetAndVae(Protocol):
    """A family's checkpoint."""

    info: ModelInfo
    unet: ModelSource
    vae: ModelSource


class LatentDiffusion(Architecture):
    """Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752)."""

    compiled_blocks = ("BasicTransformerBlock", "ResnetBlock2D")

    # ---- files ----

    def load_vae(self, checkpoint: HasUnetAndVae, *, dtype: torch.dtype, device: str) -> nn.Module:
        source = checkpoint.vae
        return load_frozen(source, partial(kl_vae.build_vae, source.config), dtype=dtype, device=device)

    def vae_identity(self, checkpoint: HasUnetAndVae) -> str:
        return vae_identity(checkpoint.vae)

    def load_denoiser(self, checkpoint: HasUnetAndVae, *, dtype: torch.dtype, device: str) -> nn.Module:
        source = checkpoint.unet
        unet = load_frozen(source, partial(ldm_unet.build_unet, source.config), dtype=dtype, device=device)
        setattr(unet, LORA_TARGET, self.denoiser_target_of(source))
        return unet

    def denoiser_target_of(self, source: ModelSource) -> LoraTarget:
        """Return the adapter target of this U-Net; file names may depend on its sizes."""
        return self.denoiser_target

    # ---- text ----

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        # the tokenizers of a family differ only in their padding
        return clip_text.caption_length(tokenizers[0], caption, max_token_length=max_token_length, weighted=weighted)

    # ---- latents ----

    def encode_images(self, vae: nn.Module, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return kl_vae.encode_images(vae, pixels, generators)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return kl_vae.decode_latents(vae, latents / self.latent.scale + self.latent.shift)

    # ---- diffusion ----

    def noise_schedule(self, *, zero_terminal_snr: bool) -> NoiseSchedule:
        from library.diffusion.ddpm import NoiseSchedule

        return NoiseSchedule.scaled_linear(
            num_timesteps=1000, beta_start=0.00085, beta_end=0.012, zero_terminal_snr=zero_terminal_snr
        )

    def objective(self, *, v_prediction: bool, zero_terminal_snr: bool) -> Objective:
        from library.diffusion.objective import DdpmObjective

        schedule = self.noise_schedule(zero_terminal_snr=zero_terminal_snr)
        return DdpmObjective(schedule, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)

    # ---- memory and speed ----

    def set_attention(self, denoiser: nn.Module, backend: str) -> None:
        ldm_unet.set_unet_attention(denoiser, backend)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        denoiser.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            clip.enable_gradient_checkpointing(text_encoder)
