"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.common import clip, clip_text, kl_vae, t5
from library.architectures.common.checkpoint import vae_identity
from library.architectures.common.identity import weights_identity
from library.architectures.common.loading import ModelSource, without_mapping
from library.architectures.common.tokenizer_files import T5, find_tokenizer, has_tokenizer
from library.architectures.conditioning import CaptionLength, Conditioning, Control, SampleFacts
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.lora_target import LoraTarget
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import DENOISER, VAE, Part, built_by, by_name, text_encoder_name
from library.architectures.sd3 import text as sd3_text
from library.architectures.sd3.checkpoint import SD3Checkpoint, inspect_model, pooled_width
from library.architectures.sd3.model import MMDiT
from library.architectures.sd3.options import DECLARATION, SD3Options, own_dtype, trains_t5
from library.architectures.sd3.positions import PositionTables, random_crops
from library.architectures.sd3.targets import CLIP_G, CLIP_L, T5XXL
from library.architectures.sd3.targets import DENOISER as DENOISER_TARGET
from library.config.flow import FLOW_SHIFT, WeightingOptions
from library.config.prompt_options import DDPM_FIELDS
from library.randomness import Draw

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.image_settings import ImageSettings
    from library.diffusion.objective import FlowObjective

#: the shift of timesteps in generation
SAMPLING_SHIFT = 3.0
STRIDE = 8

_CLIP_ARRAYS = {
    "lg_out": ("T", "D"),
    "lg_pooled": ("P",),
    "clip_l_attn_mask": ("T",),
    "clip_g_attn_mask": ("T",),
}
_T5_ARRAYS = {"t5_out": ("T5", "D5"), "t5_attn_mask": ("T5",)}


class StableDiffusion3(Architecture):
    """Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"."""

    name = "sd3"
    latent = LatentFormat(
        channels=16,
        stride=STRIDE,
        scale=1.5305,
        shift=0.0609,
        cache_suffix="_sd3.npz",
        multi_resolution=True,
        bucket_step=16,
    )
    denoiser_target = DENOISER_TARGET
    compiled_blocks = ("MMDiTBlock",)
    declaration = DECLARATION
    sample_defaults = {"width": 512, "height": 512, "sample_steps": 30, "scale": 7.5}
    sample_fields = DDPM_FIELDS - {"sample_sampler"}
    sample_size_step = 16

    #: results of ``for_model``: whether there is T5, the widths of CLIP-L and of the transformer's input
    _has_t5 = True
    _l_widths = (768, 768)
    _context = 4096
    _sampling_shift = SAMPLING_SHIFT
    _tables: PositionTables | None = None

    @property
    def length_option(self) -> str:  # type: ignore[override]
        return "t5xxl_max_token_length" if self._has_t5 else ""

    @property
    def _masks(self) -> sd3_text.Masks:
        own = self.chosen(SD3Options)
        return sd3_text.Masks(clip=own.apply_lg_attn_mask, t5=own.apply_t5_attn_mask)

    @property
    def text(self) -> TextFormat:  # type: ignore[override]
        own = self.chosen(SD3Options)
        settings: dict[str, Any] = {"apply_lg_attn_mask": own.apply_lg_attn_mask}
        if self._has_t5:
            settings |= {
                "apply_t5_attn_mask": own.apply_t5_attn_mask,
                "t5xxl_max_token_length": own.t5xxl_max_token_length,
            }
        return TextFormat(
            cache_suffix="_sd3_te.npz",
            arrays={**_CLIP_ARRAYS, **(_T5_ARRAYS if self._has_t5 else {})},
            settings=settings,
            extras=partial(sd3_text.published_extras, masks=self._masks, width=self._context),
        )

    @property
    def text_encoder_targets(self) -> tuple[LoraTarget, ...]:  # type: ignore[override]
        return (CLIP_L, CLIP_G, T5XXL) if self._has_t5 else (CLIP_L, CLIP_G)

    def for_model(self, checkpoint: SD3Checkpoint) -> Self:
        made = copy.copy(self)
        made._has_t5 = checkpoint.has_t5
        first = checkpoint.text_encoders[0].config
        made._l_widths = (first["hidden_size"], pooled_width(first))
        made._context = checkpoint.sizes.context
        return made

    def for_resolutions(self, resolutions: Sequence[tuple[int, int]]) -> Self:
        if not self.chosen(SD3Options).enable_scaled_pos_embed:
            return self
        made = copy.copy(self)
        made._tables = PositionTables.of(resolutions)
        return made

    def for_image(self, settings: ImageSettings) -> Self:
        """Return the settings with the prompt's ``--fs``."""
        shift = settings.own.get(FLOW_SHIFT.field)
        if shift is None:
            return self
        made = copy.copy(self)
        made._sampling_shift = shift
        return made

    # ---- files ----

    def inspect(
        self,
        path_or_id: str,
        *,
        v2: bool = False,
        v_parameterization: bool = False,
        vae: str | None,
        tokenizer_cache_dir: str | None,
        disable_mmap: bool = False,
    ) -> SD3Checkpoint:
        checkpoint = inspect_model(
            path_or_id, self.chosen(SD3Options), vae=vae, tokenizer_cache_dir=tokenizer_cache_dir
        )
        return without_mapping(checkpoint) if disable_mmap else checkpoint

    def load_tokenizers(self, checkpoint: SD3Checkpoint) -> list[Any]:
        first, second, *rest = checkpoint.tokenizer_folders
        return sd3_text.load_tokenizers(first, second, rest[0] if rest else None)

    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        clip_folder = find_tokenizer(folder)
        third = next((f for f in (folder, folder / "tokenizer_3") if has_tokenizer(f, T5)), None)
        return sd3_text.load_tokenizers(clip_folder, clip_folder, third)

    def parts(self, checkpoint: SD3Checkpoint) -> dict[str, Part]:
        sizes = checkpoint.sizes
        found = zip(checkpoint.text_encoders, self.text_encoder_targets, strict=True)
        encoders = [
            self._text_part(text_encoder_name(number), source, naming)
            for number, (source, naming) in enumerate(found, start=1)
        ]
        denoiser = Part(
            DENOISER, checkpoint.transformer, built_by(lambda _: MMDiT(sizes)), self.denoiser_target, self.block_lists
        )
        return by_name(encoders, denoiser, Part(VAE, checkpoint.vae, built_by(kl_vae.build_vae)))

    def _text_part(self, name: str, source: ModelSource, naming: LoraTarget) -> Part:
        if naming is T5XXL:
            own = self.chosen(SD3Options)
            return Part(
                name, source, t5.load_t5, naming, dtype=own_dtype(own.t5xxl_dtype), device=own.t5xxl_device or None
            )
        projection = "projection_dim" in source.config
        return Part(name, source, built_by(clip.build_clip_with_projection if projection else clip.build_clip), naming)

    def block_lists(self, denoiser: nn.Module) -> Sequence[Sequence[nn.Module]]:
        return (list(denoiser.joint_blocks),)

    @property
    def blocks_to_swap(self) -> int:
        return self.chosen(SD3Options).blocks_to_swap or 0

    def live_encoders(self, trained: Sequence[bool]) -> tuple[bool, ...]:
        # the outputs of both CLIPs are joined
        return (any(trained[:2]),) * 2 + tuple(trained[2:])

    def adapted_encoders(self, network: Any) -> tuple[bool, ...]:
        text = not network.network_train_unet_only
        return (text, text, text and trains_t5(network))[: len(self.text_encoder_targets)]

    def vae_identity(self, checkpoint: SD3Checkpoint) -> str:
        return vae_identity(checkpoint.vae)

    def text_identity(self, checkpoint: SD3Checkpoint) -> WeightsIdentity:
        return weights_identity(checkpoint.text_encoders, checkpoint.tokenizer_folders)

    # files of their own
    has_own_encoders = False

    # ---- text ----

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        used = tokenizers if self._has_t5 else tokenizers[:2]
        return sd3_text.tokenize(used, captions, t5_length=self.chosen(SD3Options).t5xxl_max_token_length)

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        if self._has_t5 and len(tokenizers) > 2:
            # T5 reads the rest of captions that are too long for CLIP
            return t5.caption_length(tokenizers[2], caption, length=self.chosen(SD3Options).t5xxl_max_token_length)
        return clip_text.caption_length(tokenizers[0], caption, max_token_length=None, weighted=False)

    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        return sd3_text.encode_text(text_encoders, tokens, self._masks)

    def condition(self, encoded: Conditioning, facts: SampleFacts, draw: Draw | None) -> Conditioning:
        """Leave out encoders and move the window of positions at random: in training, never in sample images."""
        if draw is None:
            return encoded
        own = self.chosen(SD3Options)
        rates = (own.clip_l_dropout_rate, own.clip_g_dropout_rate, own.t5_dropout_rate)
        if any(rates):
            encoded = sd3_text.without_dropped(encoded, sd3_text.Dropouts(*rates, *self._l_widths), draw)
        if own.pos_emb_random_crop_rate:
            drawn = random_crops(draw, own.pos_emb_random_crop_rate)  # (B, 3)
            device = encoded["lg_out"].device
            encoded = Conditioning({**encoded.tensors, "crop": drawn.to(device, non_blocking=True)})
        return encoded

    # ---- diffusion ----

    def objective(self, *, v_prediction: bool, zero_terminal_snr: bool) -> FlowObjective:
        from library.diffusion.objective import FlowObjective

        weighting = self.chosen(WeightingOptions)
        return FlowObjective(
            timestep_sampling="weighting",
            weighting_scheme=weighting.weighting_scheme,
            logit_mean=weighting.logit_mean,
            logit_std=weighting.logit_std,
            mode_scale=weighting.mode_scale,
            shift=self.chosen(SD3Options).training_shift,
            # the loss compares clean latents, whose error is sigma times that of the velocity
            prediction_type="sigma_scaled",
            sampling_shift=self._sampling_shift,
            # as in diffusers' pipeline and in sd-scripts, whose timesteps end at the shifted 0.001
            sampling_end=0.001,
        )

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        context = sd3_text.context_of(conditioning, self._context).to(noisy.dtype)
        pooled = conditioning["lg_pooled"].to(noisy.dtype)
        table = None
        if self._tables is not None:
            rows, columns = noisy.shape[2] // denoiser.sizes.patch, noisy.shape[3] // denoiser.sizes.patch
            table = self._tables.table(rows, columns, denoiser.sizes.hidden, noisy.device)
        crop = conditioning.tensors.get("crop")
        return denoiser(noisy, timesteps, context, pooled, crop=crop, positions=table)

    # ---- memory and speed ----

    def set_attention(self, denoiser: nn.Module, backend: str, *, split: bool = False) -> None:
        denoiser.set_attention(backend, split=split)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        denoiser.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            clip.enable_gradient_checkpointing(text_encoder)

    # ---- records ----

    def metadata(self, info: ModelInfo) -> dict[str, str]:
        own, weighting = self.chosen(SD3Options), self.chosen(WeightingOptions)
        return {
            "ss_v2": "False",
            "ss_base_model_version": info.version,
            "ss_apply_lg_attn_mask": str(own.apply_lg_attn_mask),
            "ss_apply_t5_attn_mask": str(own.apply_t5_attn_mask),
        } | {f"ss_{name}": str(value) for name, value in vars(weighting).items()}

    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        # no prediction type, as in sd-scripts
        return {
            "architecture": f"stable-diffusion-3-{info.version}",
            "implementation": "diffusers",
            "default_resolution": "1024x1024",
        }


SD3 = StableDiffusion3()
