"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.architectures.common import clip, clip_text, ldm_unet
from library.architectures.common.identity import weights_identity
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.latent_diffusion import (
    CLIP_MODULES,
    NOISE_SETTINGS,
    LatentDiffusion,
    text_part,
    unet_part,
    unet_target,
    vae_part,
)
from library.architectures.common.loading import ModelSource, without_mapping
from library.architectures.common.model_writing import LazyTensors
from library.architectures.common.pipeline_writing import Pipeline
from library.architectures.common.tokenizer_files import find_tokenizer
from library.architectures.conditioning import Conditioning
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.lora_target import BlockNumbering, LoraTarget
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import Part, built_by, text_encoder_name
from library.architectures.sd import text as sd_text
from library.architectures.sd import weights as sd_weights
from library.architectures.sd.adapters import TEXT_ENCODER, UNET
from library.architectures.sd.checkpoint import SDCheckpoint, inspect_checkpoint
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.arguments import RunOptions


class StableDiffusion(LatentDiffusion):
    name = "sd"
    pipeline_class = "StableDiffusionPipeline"
    latent = LatentFormat(
        channels=4, stride=8, scale=0.18215, shift=0.0, cache_suffix="_sd.npz", multi_resolution=False
    )
    # no published layout: the predecessor caches text for later families only
    text = TextFormat(cache_suffix="_sd_te.npz", arrays={"context": ("T", "D")})
    text_encoder_targets = (LoraTarget(TEXT_ENCODER.prefix, CLIP_MODULES, diffusers_root=TEXT_ENCODER.diffusers),)
    denoiser_target = unet_target(UNET, BlockNumbering(down=12, mid=1, up=12))
    sample_defaults = {"width": 512, "height": 512, "sample_steps": 30, "scale": 7.5}

    # ---- files ----

    def inspect(
        self,
        path_or_id: str,
        *,
        v2: bool,
        v_parameterization: bool,
        vae: str | None,
        tokenizer_cache_dir: str | None,
        disable_mmap: bool = False,
    ) -> SDCheckpoint:
        checkpoint = inspect_checkpoint(
            path_or_id, v2=v2, v_parameterization=v_parameterization, vae=vae, tokenizer_cache_dir=tokenizer_cache_dir
        )
        return without_mapping(checkpoint) if disable_mmap else checkpoint

    def load_tokenizers(self, checkpoint: SDCheckpoint) -> list[Any]:
        return [sd_text.load_tokenizer(checkpoint.tokenizer_folder, v2=checkpoint.v2)]

    def text_identity(self, checkpoint: SDCheckpoint) -> WeightsIdentity:
        return weights_identity([checkpoint.text_encoder], [checkpoint.tokenizer_folder])

    # ---- whole models ----

    def text_parts(self, checkpoint: SDCheckpoint) -> Sequence[Part]:
        (naming,) = self.text_encoder_targets
        return (Part(text_encoder_name(1), checkpoint.text_encoder, built_by(clip.build_clip), naming),)

    def single_file_layouts(self, parts: Mapping[str, ModelSource]) -> dict[str, TensorLayout]:
        return sd_weights.layouts(parts, v2=_is_v2(parts))

    def single_file(self, parts: Mapping[str, ModelSource], states: Mapping[str, Mapping[str, Tensor]]) -> LazyTensors:
        return sd_weights.single_file(parts, states, v2=_is_v2(parts))

    def pipeline(
        self,
        parts: Mapping[str, ModelSource],
        state: Callable[[str], Mapping[str, Tensor]],
        tokenizers: Sequence[Any],
        info: ModelInfo,
        source: Path | None,
    ) -> Pipeline:
        prediction = "v_prediction" if info.v_prediction else "epsilon"
        settings = {**NOISE_SETTINGS, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction}
        return Pipeline(
            "StableDiffusionPipeline",
            (
                unet_part(parts["denoiser"], partial(state, "denoiser")),
                vae_part(parts["vae"], partial(state, "vae")),
                text_part("text_encoder", parts["text_encoder_1"], partial(state, "text_encoder_1")),
            ),
            {"tokenizer": tokenizers[0]},
            ("DDIMScheduler", settings),
            source,
            {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
        )

    def unused_modules(self, name: str, part: nn.Module, *, clip_skip: int | None) -> list[nn.Module]:
        if not name.startswith("text_encoder") or not clip_skip or clip_skip <= 1:
            return []
        return list(part.encoder.layers[1 - clip_skip :])

    # ---- text ----

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        return clip_text.tokenize(tokenizers[0], captions, max_token_length=max_token_length, weighted=weighted)

    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        return [sd_text.load_tokenizer(find_tokenizer(folder), v2=v2)]

    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        return sd_text.encode_text(text_encoders[0], tokens, clip_skip=clip_skip, emphasis=self.emphasis)

    # ---- diffusion ----

    def unet_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        return {"encoder_hidden_states": conditioning["context"]}

    def text_layers(self, denoiser: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
        return ldm_unet.text_layers(denoiser)

    # ---- records ----

    def metadata(self, info: ModelInfo) -> dict[str, str]:
        return {"ss_v2": str(info.settings["v2"]), "ss_base_model_version": info.version}

    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        prediction = "v" if info.v_prediction else "epsilon"
        if not info.settings["v2"]:
            architecture, resolution = "stable-diffusion-v1", "512x512"
        elif info.v_prediction:
            architecture, resolution = "stable-diffusion-v2-768-v", "768x768"
        else:
            architecture, resolution = "stable-diffusion-v2-512", "512x512"
        return {
            "architecture": architecture,
            "implementation": "diffusers",
            "default_resolution": resolution,
            "prediction_type": prediction,
        }

    def check_options(self, options: RunOptions, info: ModelInfo) -> None:
        skip, layers = options.model.clip_skip, info.settings["text_layers"]
        if skip is not None and not 1 <= skip <= layers:
            raise UserError(f"--clip_skip {skip}: this model's text encoder has {layers} layers, give 1 to {layers}")


def _is_v2(parts: Mapping[str, ModelSource]) -> bool:
    return bool(parts["denoiser"].config.get("use_linear_projection", False))


SD = StableDiffusion()
