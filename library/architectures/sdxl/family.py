"""Stable Diffusion XL."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.common import clip
from library.architectures.common.identity import weights_identity
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.latent_diffusion import (
    CLIP_MODULES,
    NOISE_SETTINGS,
    HasConfig,
    LatentDiffusion,
    text_part,
    unet_part,
    unet_target,
    vae_part,
)
from library.architectures.common.ldm_unet import ldm_unet_layout
from library.architectures.common.loading import ModelSource, without_mapping
from library.architectures.common.model_writing import LazyTensors
from library.architectures.common.pipeline_writing import Pipeline
from library.architectures.common.tokenizer_files import find_tokenizer
from library.architectures.conditioning import CaptionLength, Conditioning, SampleFacts
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.lora_target import BlockNumbering, LoraTarget
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import Part, built_by, text_encoder_name
from library.architectures.sdxl import text as sdxl_text
from library.architectures.sdxl import weights as sdxl_weights
from library.architectures.sdxl.adapters import TEXT_ENCODER_1, TEXT_ENCODER_2, UNET
from library.architectures.sdxl.checkpoint import SDXLCheckpoint, inspect_checkpoint
from library.architectures.sdxl.options import DECLARATION, SECOND_PROMPT
from library.config.prompt_options import TextRole
from library.randomness import Draw

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.image_settings import ImageSettings

BLOCKS = BlockNumbering(down=9, mid=3, up=9, ends=1)


class StableDiffusionXL(LatentDiffusion):
    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    addition_embed_type = "text_time"
    latent = LatentFormat(
        channels=4,
        stride=8,
        scale=0.13025,
        shift=0.0,
        cache_suffix="_sdxl.npz",
        multi_resolution=False,
        bucket_step=32,
    )
    text = TextFormat(
        cache_suffix="_te_outputs.npz",
        arrays={"hidden_state1": ("T", "D1"), "hidden_state2": ("T", "D2"), "pool2": ("P",)},
    )
    text_encoder_targets = (
        LoraTarget(TEXT_ENCODER_1.prefix, CLIP_MODULES, diffusers_root=TEXT_ENCODER_1.diffusers),
        LoraTarget(TEXT_ENCODER_2.prefix, CLIP_MODULES, diffusers_root=TEXT_ENCODER_2.diffusers),
    )
    denoiser_target = unet_target(UNET, BLOCKS)
    sample_defaults = {"width": 1024, "height": 1024, "sample_steps": 30, "scale": 7.5}
    declaration = DECLARATION

    # ---- files ----

    def inspect(
        self,
        path_or_id: str,
        *,
        v2: bool = False,
        v_parameterization: bool,
        vae: str | None,
        tokenizer_cache_dir: str | None,
        disable_mmap: bool = False,
    ) -> SDXLCheckpoint:
        checkpoint = inspect_checkpoint(
            path_or_id, v_parameterization=v_parameterization, vae=vae, tokenizer_cache_dir=tokenizer_cache_dir
        )
        return without_mapping(checkpoint) if disable_mmap else checkpoint

    def load_tokenizers(self, checkpoint: SDXLCheckpoint) -> list[Any]:
        return sdxl_text.load_tokenizers(*checkpoint.tokenizer_folders)

    def text_identity(self, checkpoint: SDXLCheckpoint) -> WeightsIdentity:
        return weights_identity(checkpoint.text_encoders, checkpoint.tokenizer_folders)

    def denoiser_target_of(self, unet: HasConfig) -> LoraTarget:
        # adapter files use the original names: lora_unet_input_blocks_4_1_...
        return replace(self.denoiser_target, file_path=ldm_unet_layout(unet.config).keys.to_file)

    # ---- whole models ----

    def text_parts(self, checkpoint: SDXLCheckpoint) -> Sequence[Part]:
        builders = (clip.build_clip, clip.build_clip_with_projection)
        found = zip(checkpoint.text_encoders, builders, self.text_encoder_targets, strict=True)
        return [
            Part(text_encoder_name(number), source, built_by(build), naming)
            for number, (source, build, naming) in enumerate(found, start=1)
        ]

    def single_file_layouts(self, parts: Mapping[str, ModelSource]) -> dict[str, TensorLayout]:
        return sdxl_weights.layouts(parts)

    def single_file(self, parts: Mapping[str, ModelSource], states: Mapping[str, Mapping[str, Tensor]]) -> LazyTensors:
        return sdxl_weights.single_file(parts, states)

    def pipeline(
        self,
        parts: Mapping[str, ModelSource],
        state: Callable[[str], Mapping[str, Tensor]],
        tokenizers: Sequence[Any],
        info: ModelInfo,
        source: Path | None,
    ) -> Pipeline:
        prediction = "v_prediction" if info.v_prediction else "epsilon"
        second = partial(state, "text_encoder_2")
        return Pipeline(
            "StableDiffusionXLPipeline",
            (
                unet_part(parts["denoiser"], partial(state, "denoiser")),
                vae_part(parts["vae"], partial(state, "vae")),
                text_part("text_encoder", parts["text_encoder_1"], partial(state, "text_encoder_1")),
                text_part("text_encoder_2", parts["text_encoder_2"], second, projection=True),
            ),
            dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True)),
            (
                "EulerDiscreteScheduler",
                {**NOISE_SETTINGS, "timestep_spacing": "leading", "prediction_type": prediction},
            ),
            source,
            {"force_zeros_for_empty_prompt": False},
        )

    def unused_modules(self, name: str, part: nn.Module, *, clip_skip: int | None) -> list[nn.Module]:
        # the states of the last but one layer are used; of the second encoder the last one is, for the pooled output
        return [part.encoder.layers[-1], part.final_layer_norm] if name == "text_encoder_1" else []

    has_learning_rate_blocks = True

    def learning_rate_blocks(self, denoiser: nn.Module) -> list[list[nn.Parameter]]:
        """23 as published: embeddings of time and sizes, 9 blocks down, 3 in the middle, 9 up, and the output."""
        blocks: list[list[nn.Parameter]] = [[] for _ in range(BLOCKS.count)]
        to_file = ldm_unet_layout(denoiser.config).keys.to_file
        for name, parameter in denoiser.named_parameters():
            first, number, *_ = str(to_file(name)).split(".")
            begins = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
            place = begins[first] + int(number) if first in begins else 22 if first == "out" else 0
            blocks[place].append(parameter)
        return blocks

    # ---- text ----

    #: what the second text encoder reads instead of an image's prompt; None: the prompt
    second_prompt: str | None = None

    def for_image(self, settings: ImageSettings) -> Self:
        second = settings.own.get(SECOND_PROMPT.field)
        if not second:
            return self
        made = copy.copy(self)
        made.second_prompt = second
        return made

    def worded(self, text: str, role: TextRole) -> str:
        if role != "prompt" or self.second_prompt is None:
            return text
        return sdxl_text.joined(text, self.second_prompt)

    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        found = find_tokenizer(folder)
        return sdxl_text.load_tokenizers(found, found)

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        return sdxl_text.tokenize(tokenizers, captions, max_token_length=max_token_length, weighted=weighted)

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        return sdxl_text.caption_length(tokenizers, caption, max_token_length=max_token_length, weighted=weighted)

    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        return sdxl_text.encode_text(text_encoders, tokens, emphasis=self.emphasis)

    def condition(self, encoded: Conditioning, facts: SampleFacts, draw: Draw | None) -> Conditioning:
        """Add ``sizes`` (B, 6): Podell et al. 2023, section 2.2."""
        device = encoded["pool2"].device
        parts = [part.to(device, non_blocking=True) for part in (facts.original, facts.top_left, facts.target)]
        return Conditioning({**encoded.tensors, "sizes": torch.cat(parts, dim=1)})

    # ---- diffusion ----

    control_mixing = "mean"
    controlnets_in_diffusers_names = True

    def unet_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        context = torch.cat([conditioning["hidden_state1"], conditioning["hidden_state2"]], dim=-1)  # (B, T, D1 + D2)
        added = {"text_embeds": conditioning["pool2"], "time_ids": conditioning["sizes"]}
        return {"encoder_hidden_states": context, "added_cond_kwargs": added}

    def shrink_points(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """Number the input blocks one by one, as published: the first convolution, ResNets and downsamplers."""
        points: list[nn.Module] = [denoiser.conv_in]
        for block in denoiser.down_blocks:
            points += [*block.resnets, *(block.downsamplers or ())]
        return points

    # ---- records ----

    def metadata(self, info: ModelInfo) -> dict[str, str]:
        return {"ss_v2": "False", "ss_base_model_version": info.version}

    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        return {
            "architecture": "stable-diffusion-xl-v1-base",
            "implementation": "https://github.com/Stability-AI/generative-models",
            "default_resolution": "1024x1024",
            "prediction_type": "v" if info.v_prediction else "epsilon",
        }


SDXL = StableDiffusionXL()
