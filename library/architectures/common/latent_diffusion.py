"""The common part of families with an LDM U-Net, CLIP text encoders and a KL autoencoder: SD 1.x, 2.x and SDXL."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.architectures.adapters import AdapterNaming
from library.architectures.base import Architecture
from library.architectures.common import clip, clip_text, kl_vae, ldm_unet
from library.architectures.common.checkpoint import vae_identity
from library.architectures.common.controlnet import (
    PUBLISHED_PREFIX,
    controlnet_source,
    diffusers_layout,
    load_controlnet,
    original_layout,
    residuals,
)
from library.architectures.common.controlnet_training import (
    start_from_unet,
    write_controlnet_file,
    write_diffusers_controlnet,
)
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.model_writing import (
    LazyTensors,
    like_its_source,
    refuse_own_source,
    state_of,
    write_file,
)
from library.architectures.common.pipeline_writing import Pipeline, PipelinePart, write_pipeline
from library.architectures.conditioning import CaptionLength, Conditioning, Control
from library.architectures.controlnets import DIFFUSERS, PREFIXED, PUBLISHED, HasControlNets
from library.architectures.lora_target import BlockNumbering, LoraTarget
from library.architectures.model_info import ModelInfo
from library.architectures.part import DENOISER, VAE, Part, built_by, by_name
from library.architectures.whole_models import SavedModel

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.diffusion.ddpm import NoiseSchedule
    from library.diffusion.objective import Objective

#: classes of transformers that carry adapters
CLIP_MODULES = ("CLIPAttention", "CLIPMLP")


def unet_target(naming: AdapterNaming, blocks: BlockNumbering) -> LoraTarget:
    """Return the target of a diffusers U-Net: its attention blocks, and with 3x3 convolutions its ResNet blocks too."""
    convs = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
    return LoraTarget(
        naming.prefix,
        ("Transformer2DModel",),
        conv_classes=convs,
        blocks=blocks,
        diffusers_root=naming.diffusers,
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


#: settings of the published schedulers that all these models share
NOISE_SETTINGS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def unet_part(source: ModelSource, state: Callable[[], Mapping[str, Tensor]]) -> PipelinePart:
    """The U-Net in a Diffusers folder."""
    build = partial(ldm_unet.build_unet, source.config)
    return PipelinePart("unet", "diffusers", build, state, _own_names(build))


def vae_part(source: ModelSource, state: Callable[[], Mapping[str, Tensor]]) -> PipelinePart:
    """The autoencoder in a Diffusers folder."""
    build = partial(kl_vae.build_vae, source.config)
    return PipelinePart("vae", "diffusers", build, state, _own_names(build))


def text_part(
    folder: str, source: ModelSource, state: Callable[[], Mapping[str, Tensor]], *, projection: bool = False
) -> PipelinePart:
    """A text encoder in a Diffusers folder."""
    build = partial(clip.build_clip_with_projection if projection else clip.build_clip, source.config)
    layout = clip.clip_layout(prefix="" if projection else clip.TEXT_MODEL, projection=projection)
    return PipelinePart(folder, "transformers", build, state, layout)


def _own_names(build: Callable[[], nn.Module]) -> TensorLayout:
    with torch.device("meta"):
        names = {name.partition(".")[0] for name in build().state_dict()}
    return TensorLayout(KeyMap((name, name) for name in sorted(names)))


class HasConfig(Protocol):
    """A U-Net of diffusers, or its source."""

    @property
    def config(self) -> Any: ...


class HasUnetAndVae(Protocol):
    """A family's checkpoint."""

    info: ModelInfo
    path: str
    unet: ModelSource
    vae: ModelSource


class LatentDiffusion(HasControlNets, Architecture):
    """Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752)."""

    compiled_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    #: diffusers' class of its pipelines, and of their U-Nets' configuration what no other family has
    pipeline_class: str
    addition_embed_type: str | None = None

    # ---- files ----

    def vae_identity(self, checkpoint: HasUnetAndVae) -> str:
        return vae_identity(checkpoint.vae)

    def denoiser_target_of(self, unet: HasConfig) -> LoraTarget:
        """Return the adapter target of a U-Net, or of its source; file names may depend on its sizes."""
        return self.denoiser_target

    # ---- whole models ----

    model_forms = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")

    def parts(self, checkpoint: HasUnetAndVae) -> dict[str, Part]:
        unet = Part(DENOISER, checkpoint.unet, built_by(ldm_unet.build_unet), self.denoiser_target_of(checkpoint.unet))
        return by_name(self.text_parts(checkpoint), unet, Part(VAE, checkpoint.vae, built_by(kl_vae.build_vae)))

    @abstractmethod
    def text_parts(self, checkpoint: Any) -> Sequence[Part]:
        """The text encoders, in their order."""

    @abstractmethod
    def single_file(self, parts: Mapping[str, ModelSource], states: Mapping[str, Mapping[str, Tensor]]) -> LazyTensors:
        """A file in the original layout from the parts' tensors by the models' names."""

    @abstractmethod
    def single_file_layouts(self, parts: Mapping[str, ModelSource]) -> dict[str, TensorLayout]:
        """Return the places of the parts in a file in the original layout."""

    @abstractmethod
    def pipeline(
        self,
        parts: Mapping[str, ModelSource],
        state: Callable[[str], Mapping[str, Tensor]],
        tokenizers: Sequence[Any],
        info: ModelInfo,
        source: Path | None,
    ) -> Pipeline:
        """The model as a Diffusers folder holds it."""

    def write(self, path: Path, checkpoint: HasUnetAndVae, trained: Mapping[str, nn.Module], saved: SavedModel) -> None:
        parts, place = self.sources(checkpoint), Path(checkpoint.path)
        refuse_own_source(path, parts)
        if saved.form.startswith("diffusers"):
            source = place if place.is_dir() else None
            pipeline = self.pipeline(
                parts, lambda name: state_of(name, parts, trained), saved.tokenizers, checkpoint.info, source
            )
            write_pipeline(path, pipeline, dtype=saved.dtype, safetensors=saved.form == "diffusers_safetensors")
            return
        if place.is_dir():
            tensors = self.single_file(parts, {name: state_of(name, parts, trained) for name in parts})
        else:
            tensors = like_its_source(checkpoint.unet.file, parts, trained, self.single_file_layouts(parts))
        write_file(path, tensors, dtype=saved.dtype, metadata=saved.metadata, counters=saved.counters)

    # ---- text ----

    #: what emphasis keeps of a text's encoding, see ``clip_text.emphasise``
    emphasis = "original"

    def with_emphasis(self, keeps: str) -> Self:
        """Return a copy whose emphasis keeps something else."""
        made = copy.copy(self)
        made.emphasis = keeps
        return made

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        # the tokenizers of a family differ only in their padding
        return clip_text.caption_length(tokenizers[0], caption, max_token_length=max_token_length, weighted=weighted)

    # ---- diffusion ----

    @abstractmethod
    def unet_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """Return the arguments of U-Net and ControlNet that follow from the conditioning."""

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        inputs = {**self.unet_inputs(conditioning), **unet_control(control)}
        return denoiser(noisy, timesteps, return_dict=False, **inputs)[0]

    #: how several ControlNets act: the "mean" of their outputs, or "alternate" from one call of the model to the next
    control_mixing = "alternate"

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
        """Return what a ControlNet adds to ``predict``, see ``controlnet.residuals``."""
        return residuals(controlnet, noisy, timesteps, self.unet_inputs(conditioning), image, weight=weight)

    def noise_schedule(self, *, zero_terminal_snr: bool) -> NoiseSchedule:
        from library.diffusion.ddpm import NoiseSchedule

        return NoiseSchedule.scaled_linear(
            num_timesteps=1000, beta_start=0.00085, beta_end=0.012, zero_terminal_snr=zero_terminal_snr
        )

    def objective(self, *, v_prediction: bool, zero_terminal_snr: bool) -> Objective:
        from library.diffusion.objective import DdpmObjective

        schedule = self.noise_schedule(zero_terminal_snr=zero_terminal_snr)
        return DdpmObjective(schedule, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)

    def shrink_points(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        return list(denoiser.down_blocks)

    # ---- ControlNets ----

    controlnet_layouts = (PUBLISHED, PREFIXED, DIFFUSERS)
    #: whether the usual file of a ControlNet has diffusers' names, instead of the original ones
    controlnets_in_diffusers_names = False

    def controlnet_source(self, path_or_id: str, checkpoint: HasUnetAndVae, *, flag: str) -> ModelSource:
        return controlnet_source(path_or_id, checkpoint.unet, flag=flag)

    def load_controlnet(self, source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
        return load_controlnet(source, dtype=dtype, device=device)

    def new_controlnet(self, checkpoint: HasUnetAndVae, *, device: str) -> nn.Module:
        return start_from_unet(checkpoint.unet, device=device)

    def control_image(self, pixels: Tensor) -> Tensor:
        return (pixels + 1) / 2

    def set_controlnet_attention(self, controlnet: nn.Module, backend: str, *, split: bool = False) -> None:
        ldm_unet.set_unet_attention(controlnet, backend, split=split)

    def write_controlnet(
        self,
        path: Path,
        controlnet: nn.Module,
        layout: str,
        checkpoint: HasUnetAndVae,
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
    ) -> None:
        if layout == DIFFUSERS:
            write_diffusers_controlnet(path, controlnet, dtype=dtype)
            return
        if layout == PUBLISHED and self.controlnets_in_diffusers_names:
            names = diffusers_layout()
        else:
            names = original_layout(controlnet.config, prefix=PUBLISHED_PREFIX if layout == PREFIXED else "")
        write_controlnet_file(path, controlnet, names, dtype=dtype, metadata=metadata)

    # ---- memory and speed ----

    def set_attention(self, denoiser: nn.Module, backend: str, *, split: bool = False) -> None:
        ldm_unet.set_unet_attention(denoiser, backend, split=split)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        denoiser.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            clip.enable_gradient_checkpointing(text_encoder)
