"""FLUX.1 (dev and schnell) and Chroma."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.common import ae as flux_vae
from library.architectures.common import clip, clip_text, t5
from library.architectures.common.attention import check_backend
from library.architectures.common.checkpoint import vae_identity
from library.architectures.common.controlnet import as_features
from library.architectures.common.controlnet_training import write_controlnet_file, write_diffusers_controlnet
from library.architectures.common.flow_matching import FlowMatching
from library.architectures.common.identity import weights_identity
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.loading import ModelSource, without_mapping
from library.architectures.common.tokenizer_files import T5, find_tokenizer
from library.architectures.common.transformer_file import TransformerFile
from library.architectures.conditioning import CaptionLength, Conditioning, Control
from library.architectures.controlnets import DIFFUSERS, HasControlNets
from library.architectures.flux import text as flux_text
from library.architectures.flux.adapters import RECORDS
from library.architectures.flux.checkpoint import load_transformer, published_layout
from library.architectures.flux.controlnet import build as build_controlnet
from library.architectures.flux.controlnet import controlnet_source, load_controlnet, residuals
from library.architectures.flux.controlnet_files import published_layout as published_controlnet_layout
from library.architectures.flux.controlnet_files import start_from_transformer
from library.architectures.flux.inspection import FluxCheckpoint, inspect_model, refuse_other_variant
from library.architectures.flux.names import DEV, SCHNELL
from library.architectures.flux.options import CHROMA, DECLARATION, TRAINS_CONTROLNETS, FluxModelOptions, trains_t5
from library.architectures.flux.targets import CHROMA_DENOISER, CLIP_L, T5XXL
from library.architectures.flux.targets import DENOISER as DENOISER_TARGET
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.lora_target import LoraTarget
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import DENOISER, VAE, Part, built_by, by_name, text_encoder_name
from library.config.declaration import message
from library.config.no_effect import report
from library.errors import NoEffect, UserError, naming

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.arguments import RunOptions
    from library.config.image_settings import ImageSettings

#: sampling steps, if not given; sample images have their own
SAMPLING_STEPS, SAMPLING_STEPS_SCHNELL = 50, 4
#: tokens of a caption for T5, if not given
T5_LENGTH, T5_LENGTH_SCHNELL = 512, 256

_T5_ARRAYS = {"t5_out": ("T", "D"), "t5_attn_mask": ("T",)}

_SCHNELL_HAS_NO_GUIDANCE = "with FLUX.1 schnell, which takes no guidance scale"


class Flux(FlowMatching, TransformerFile, HasControlNets, Architecture):
    """FLUX.1 (Black Forest Labs 2024) and Chroma1 (Rock 2025), which ``--model_type`` chooses."""

    name = "flux"
    latent = LatentFormat(
        channels=flux_vae.CHANNELS,
        stride=8,
        scale=flux_vae.SCALE,
        shift=flux_vae.SHIFT,
        cache_suffix="_flux.npz",
        multi_resolution=True,
        stored_scaled=True,
        bucket_step=16,
    )
    denoiser_target = DENOISER_TARGET
    compiled_blocks = ("DoubleStreamBlock", "SingleStreamBlock")
    declaration = DECLARATION
    length_option = "t5xxl_max_token_length"
    sample_fields = FlowMatching.sample_fields | {"guidance_scale"}
    sample_size_step = 16

    #: which model it is, from its file; None before ``inspect``
    _kind: str | None = None

    @property
    def takes_images(self) -> bool:  # type: ignore[override]
        return bool(getattr(self.chosen(FluxModelOptions), "controlnet_model_name_or_path", None))

    @property
    def is_chroma(self) -> bool:
        return self.chosen(FluxModelOptions).model_type == CHROMA

    @property
    def masks_text(self) -> bool:
        """Whether padding is masked in T5 and the transformer; always with Chroma."""
        return self.is_chroma or self.chosen(FluxModelOptions).apply_t5_attn_mask

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale may be chosen: schnell has none, and Chroma is made for 0."""
        return not self.is_chroma and self._kind != SCHNELL

    @property
    def t5_length(self) -> int:
        """Return the tokens of a caption for T5."""
        given = self.chosen(FluxModelOptions).t5xxl_max_token_length
        return given or (T5_LENGTH_SCHNELL if self._kind == SCHNELL else T5_LENGTH)

    @property
    def sampling_steps(self) -> int:
        """Return the published script's default steps."""
        return SAMPLING_STEPS_SCHNELL if self._kind == SCHNELL else SAMPLING_STEPS

    # ---- what depends on the kind of model ----

    @property
    def text(self) -> TextFormat:  # type: ignore[override]
        return TextFormat(
            cache_suffix="_flux_te.npz",
            arrays=_T5_ARRAYS if self.is_chroma else {"l_pooled": ("P",), **_T5_ARRAYS},
            settings={"apply_t5_attn_mask": self.masks_text, "t5xxl_max_token_length": self.t5_length},
            extras=partial(flux_text.published_extras, apply_t5_attn_mask=self.masks_text),
        )

    @property
    def text_encoder_targets(self) -> tuple[LoraTarget, ...]:  # type: ignore[override]
        return (T5XXL,) if self.is_chroma else (CLIP_L, T5XXL)

    @property
    def sample_defaults(self) -> Mapping[str, Any]:  # type: ignore[override]
        guidance = {"guidance_scale": 3.5} if self.takes_guidance else {}
        return {"width": 512, "height": 512, "sample_steps": 20, "scale": 1.0, **guidance}

    @property
    def idle_sample_fields(self) -> Mapping[str, str]:  # type: ignore[override]
        if self.takes_guidance:
            return {}
        return {"guidance_scale": "with Chroma, which is made for 0" if self.is_chroma else _SCHNELL_HAS_NO_GUIDANCE}

    def for_model(self, checkpoint: FluxCheckpoint) -> Self:
        made = copy.copy(self)
        made._kind = checkpoint.kind
        # schnell is distilled for few steps without a shift
        made.sampling_shift = 1.0 if checkpoint.kind == SCHNELL else self.sampling_shift
        return made

    def for_image(self, settings: ImageSettings) -> Self:
        made = super().for_image(settings)
        if settings.guidance_scale is None:
            return made
        return made.changed(FluxModelOptions, guidance_scale=settings.guidance_scale)

    # ---- files ----

    def inspect(
        self,
        path_or_id: str,
        *,
        v2: bool = False,
        v_parameterization: bool = False,
        vae: str | None = None,
        tokenizer_cache_dir: str | None,
        disable_mmap: bool = False,
    ) -> FluxCheckpoint:
        own = self.chosen(FluxModelOptions)
        checkpoint = inspect_model(path_or_id, own, tokenizer_cache_dir=tokenizer_cache_dir)
        return without_mapping(checkpoint) if disable_mmap else checkpoint

    def load_tokenizers(self, checkpoint: FluxCheckpoint) -> list[Any]:
        return self._load_tokenizers(checkpoint.tokenizer_folders)

    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        t5_folder = find_tokenizer(folder, T5, subfolder="tokenizer_2")
        return self._load_tokenizers((t5_folder,) if self.is_chroma else (find_tokenizer(folder), t5_folder))

    def _load_tokenizers(self, folders: Sequence[Path]) -> list[Any]:
        *clip_folders, t5_folder = folders
        return [*map(clip_text.load_tokenizer, clip_folders), t5.load_tokenizer(t5_folder)]

    def block_lists(self, denoiser: nn.Module) -> Sequence[Sequence[nn.Module]]:
        return list(denoiser.double_blocks), list(denoiser.single_blocks)

    @property
    def blocks_to_swap(self) -> int:
        return self.chosen(FluxModelOptions).swapped

    def live_encoders(self, trained: Sequence[bool]) -> tuple[bool, ...]:
        return tuple(trained)

    def adapted_encoders(self, network: Any) -> tuple[bool, ...]:
        with_t5 = not network.network_train_unet_only and trains_t5(network)
        return (with_t5,) if self.is_chroma else (not network.network_train_unet_only, with_t5)

    def vae_identity(self, checkpoint: FluxCheckpoint) -> str:
        return vae_identity(checkpoint.vae)

    def text_identity(self, checkpoint: FluxCheckpoint) -> WeightsIdentity:
        return weights_identity(checkpoint.text_encoders, checkpoint.tokenizer_folders)

    def parts(self, checkpoint: FluxCheckpoint) -> dict[str, Part]:
        encoders = [
            Part(
                text_encoder_name(number),
                source,
                t5.load_t5 if naming is T5XXL else built_by(clip.build_clip),
                naming,
            )
            for number, (source, naming) in enumerate(
                zip(checkpoint.text_encoders, self.text_encoder_targets, strict=True), start=1
            )
        ]

        def read(source: ModelSource, /, *, dtype: torch.dtype, device: str) -> nn.Module:
            denoiser = load_transformer(checkpoint.found, dtype=dtype, device=device)
            if checkpoint.controlnet is not None:
                denoiser.controlnet = load_controlnet(checkpoint.controlnet, dtype=dtype, device=device)
            return denoiser

        naming = CHROMA_DENOISER if self.is_chroma else DENOISER_TARGET
        denoiser = Part(DENOISER, checkpoint.found.source, read, naming, self.block_lists)
        return by_name(encoders, denoiser, Part(VAE, checkpoint.vae, flux_vae.load_ae))

    def saved_layout(self, checkpoint: FluxCheckpoint) -> TensorLayout:
        return published_layout()

    # ---- text ----

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        *clip_tokenizers, t5_tokenizer = tokenizers
        clip_tokenizer = clip_tokenizers[0] if clip_tokenizers else None
        return flux_text.tokenize(clip_tokenizer, t5_tokenizer, captions, t5_length=self.t5_length)

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        # CLIP-L, which reads 75 tokens, gives only the pooled vector; T5's length is what matters
        return t5.caption_length(tokenizers[-1], caption, length=self.t5_length)

    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        *clip_encoders, t5_encoder = text_encoders
        clip_encoder = clip_encoders[0] if clip_encoders else None
        return flux_text.encode_text(clip_encoder, t5_encoder, tokens, apply_t5_mask=self.masks_text)

    # ---- diffusion ----

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        own = self.chosen(FluxModelOptions)
        guidance = torch.full_like(timesteps, own.guidance_scale)  # (B,)
        context = conditioning["t5_out"].to(noisy.dtype)
        mask = conditioning["t5_attn_mask"]
        if self.is_chroma:
            return denoiser(noisy, timesteps / 1000, context, mask, guidance)
        pooled = conditioning["l_pooled"].to(noisy.dtype)
        mask = mask if self.masks_text else None
        added = {} if control is None else dict(control)
        if "residuals" in added:  # a list for fewer blocks, which take them in turn
            given, blocks = added.pop("residuals"), len(denoiser.double_blocks)
            added["double_residuals"] = [given[index % len(given)] for index in range(blocks)]
        return denoiser(noisy, timesteps / 1000, context, pooled, guidance, text_mask=mask, **added)

    def encode_control(self, vae: nn.Module, images: Tensor, generators: Sequence[torch.Generator]) -> Control:
        return {"image": self.scale_latents(self.encode_images(vae, images, generators))}

    # ---- ControlNets ----

    def controlnet_source(self, path_or_id: str, checkpoint: FluxCheckpoint, *, flag: str) -> ModelSource:
        return controlnet_source(path_or_id, checkpoint.sizes, pixels=True)

    def load_controlnet(self, source: ModelSource, *, dtype: torch.dtype, device: str) -> nn.Module:
        return load_controlnet(source, dtype=dtype, device=device)

    def new_controlnet(self, checkpoint: FluxCheckpoint, *, device: str) -> nn.Module:
        return start_from_transformer(build_controlnet, checkpoint.transformer, checkpoint.sizes, device=device)

    def control_image(self, pixels: Tensor) -> Tensor:
        return pixels

    #: of several ControlNets, the mean of the outputs is added
    control_mixing = "mean"

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
        guidance = torch.full_like(timesteps, self.chosen(FluxModelOptions).guidance_scale)  # (B,)
        context, pooled = conditioning["t5_out"].to(noisy.dtype), conditioning["l_pooled"].to(noisy.dtype)
        image = image.repeat(len(noisy) // len(image), 1, 1, 1)
        found, _ = residuals(controlnet, noisy, timesteps / 1000, context, pooled, guidance, image=image)
        return {"residuals": [as_features(residual * weight) for residual in found or []]}

    def set_controlnet_attention(self, controlnet: nn.Module, backend: str, *, split: bool = False) -> None:
        if split:
            raise UserError("--split_attn: not in ControlNets of FLUX.1, which attend to a whole batch; remove it")
        names = {
            "torch": "native", "efficient": "_native_efficient", "math": "_native_math", "xformers": "xformers",
            "flash": "flash", "flex": "flex", "sageattn": "sage",
        }  # fmt: skip
        check_backend(backend)
        controlnet.set_attention_backend(names[backend])

    def write_controlnet(
        self,
        path: Path,
        controlnet: nn.Module,
        layout: str,
        checkpoint: FluxCheckpoint,
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
    ) -> None:
        if layout == DIFFUSERS:
            write_diffusers_controlnet(path, controlnet, dtype=dtype)
            return
        config: Any = controlnet.config
        names = published_controlnet_layout(config.num_layers, guidance=config.guidance_embeds)
        write_controlnet_file(path, controlnet, names, dtype=dtype, metadata=metadata)

    def check_options(self, options: RunOptions, info: ModelInfo) -> None:
        scale = self.chosen(FluxModelOptions).guidance_scale
        if self._kind == SCHNELL and scale != FluxModelOptions.guidance_scale:
            said = NoEffect(message(["guidance_scale"], _SCHNELL_HAS_NO_GUIDANCE))
            report([said], strict=options.config.strict)
        network = getattr(options, "network", None)
        if network is None:
            return  # whole models are trained
        for flag, paths in (("network_weights", [network.network_weights]), ("base_weights", network.base_weights)):
            for path in filter(None, paths or []):
                with naming(f"--{flag}", path):
                    refuse_other_variant(Path(path), info.version)

    # ---- memory and speed ----

    def set_attention(self, denoiser: nn.Module, backend: str, *, split: bool = False) -> None:
        denoiser.set_attention(backend, split=split)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        denoiser.enable_gradient_checkpointing()
        if self.takes_images:
            denoiser.controlnet.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            clip.enable_gradient_checkpointing(text_encoder)

    # ---- records ----

    def metadata(self, info: ModelInfo) -> dict[str, str]:
        own = self.chosen(FluxModelOptions)
        return {
            "ss_v2": "False",
            "ss_base_model_version": info.version,
            "ss_model_type": own.model_type,
            "ss_apply_t5_attn_mask": str(own.apply_t5_attn_mask),
            "ss_guidance_scale": str(own.guidance_scale),
        } | self.flow_metadata()

    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        # no prediction type, as published
        return RECORDS[self._kind or DEV].modelspec()


FLUX = Flux()


class FluxForControlNets(Flux):
    """FLUX.1 where a ControlNet is trained, instead of another one used beside."""

    declaration = TRAINS_CONTROLNETS


FLUX_FOR_CONTROLNETS = FluxForControlNets()
