"""Lumina-Image 2.0."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.common import ae, clip
from library.architectures.common.checkpoint import vae_identity
from library.architectures.common.flow_matching import FlowMatching
from library.architectures.common.identity import weights_identity
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.loading import without_mapping
from library.architectures.common.tokenizer_files import GEMMA, find_tokenizer
from library.architectures.common.transformer_file import TransformerFile
from library.architectures.conditioning import CaptionLength, Conditioning, Control
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.lumina import gemma2
from library.architectures.lumina.adapters import RECORD
from library.architectures.lumina.checkpoint import LuminaCheckpoint, inspect_model
from library.architectures.lumina.model import NextDiT
from library.architectures.lumina.names import LAYOUTS
from library.architectures.lumina.options import DECLARATION, LENGTH, LuminaOptions
from library.architectures.lumina.targets import DENOISER as DENOISER_TARGET
from library.architectures.lumina.targets import GEMMA2
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import DENOISER, VAE, Part, built_by, by_name, text_encoder_name
from library.config.flow import FlowOptions
from library.config.prompt_options import TextRole

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.arguments import TrainingOptions

#: between the system prompt and a caption
PROMPT_START = "<Prompt Start>"


class LuminaImage2(FlowMatching, TransformerFile, Architecture):
    """Qin et al. 2025, "Lumina-Image 2.0: A Unified and Efficient Image Generative Framework" (arXiv:2503.21758)."""

    name = "lumina"
    latent = LatentFormat(
        channels=ae.CHANNELS,
        stride=8,
        scale=ae.SCALE,
        shift=ae.SHIFT,
        cache_suffix="_lumina.npz",
        multi_resolution=True,
        stored_scaled=True,
        bucket_step=16,
    )
    text_encoder_targets = (GEMMA2,)
    denoiser_target = DENOISER_TARGET
    compiled_blocks = ("JointTransformerBlock",)
    declaration = DECLARATION
    length_option = "gemma2_max_token_length"
    sampling_shift = 6.0
    sample_defaults = {
        "width": 1024, "height": 1024, "sample_steps": 36, "scale": 3.5, "cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0,
    }  # fmt: skip
    sample_size_step = 16
    guidance = "normed_guidance"

    _system_prompt_in_negative = False

    def with_system_prompt_in_negative(self) -> Self:
        """Return this family with the system prompt before negative prompts, too."""
        made = copy.copy(self)
        made._system_prompt_in_negative = True
        return made

    @property
    def sample_batch_size(self) -> int:  # type: ignore[override]
        return self.chosen(LuminaOptions).sample_batch_size or 1

    @property
    def text_length(self) -> int:
        """Return the tokens of a caption."""
        return self.chosen(LuminaOptions).gemma2_max_token_length or LENGTH

    @property
    def text(self) -> TextFormat:  # type: ignore[override]
        return TextFormat(
            cache_suffix="_lumina_te.npz",
            arrays={"hidden_state": ("T", "D"), "attention_mask": ("T",), "input_ids": ("T",)},
            settings={
                "gemma2_max_token_length": self.text_length,
                "system_prompt": self.chosen(LuminaOptions).system_prompt,
            },
        )

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
    ) -> LuminaCheckpoint:
        own = self.chosen(LuminaOptions)
        checkpoint = inspect_model(path_or_id, own, tokenizer_cache_dir=tokenizer_cache_dir)
        return without_mapping(checkpoint) if disable_mmap else checkpoint

    def load_tokenizers(self, checkpoint: LuminaCheckpoint) -> list[Any]:
        return [gemma2.load_tokenizer(checkpoint.tokenizer_folder)]

    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        return [gemma2.load_tokenizer(find_tokenizer(folder, GEMMA))]

    def block_lists(self, denoiser: nn.Module) -> Sequence[Sequence[nn.Module]]:
        return (list(denoiser.layers),)

    @property
    def blocks_to_swap(self) -> int:
        return self.chosen(LuminaOptions).blocks_to_swap or 0

    def vae_identity(self, checkpoint: LuminaCheckpoint) -> str:
        return vae_identity(checkpoint.vae)

    def text_identity(self, checkpoint: LuminaCheckpoint) -> WeightsIdentity:
        return weights_identity((checkpoint.text_encoder,), (checkpoint.tokenizer_folder,))

    def parts(self, checkpoint: LuminaCheckpoint) -> dict[str, Part]:
        sizes = checkpoint.sizes
        denoiser = Part(
            DENOISER, checkpoint.transformer, built_by(lambda _: NextDiT(sizes)), self.denoiser_target, self.block_lists
        )
        encoder = Part(text_encoder_name(1), checkpoint.text_encoder, gemma2.load, GEMMA2)
        return by_name([encoder], denoiser, Part(VAE, checkpoint.vae, ae.load_ae))

    def saved_layout(self, checkpoint: LuminaCheckpoint) -> TensorLayout:
        return LAYOUTS.published()

    # ---- whole models ----

    def unused_modules(self, name: str, part: nn.Module, *, clip_skip: int | None) -> list[nn.Module]:
        return [part.norm_final] if name == "denoiser" and part.sizes.final_norm else []

    # ---- text ----

    def worded(self, text: str, role: TextRole) -> str:
        """Return captions and prompts behind the system prompt; empty ones stand for no caption, and stay empty."""
        system = self.chosen(LuminaOptions).system_prompt
        if not system or not text or (role == "negative" and not self._system_prompt_in_negative):
            return text
        return f"{system} {PROMPT_START} {text}"

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        ids, mask = gemma2.tokenize(tokenizers[0], captions, length=self.text_length)
        return {"input_ids": ids, "attention_mask": mask}

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        return gemma2.caption_length(tokenizers[0], caption, length=self.text_length)

    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = gemma2.encode(text_encoders[0], ids, mask)
        return Conditioning({"hidden_state": states, "attention_mask": mask, "input_ids": ids})

    # ---- diffusion ----

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        """Predict as ``Architecture.predict`` says.

        The model's time runs from noise (0) to the image (1), and so does its velocity: the output is turned round.
        What is added to the noisy image (additive) points to the image already.
        """
        context = conditioning["hidden_state"].to(noisy.dtype)
        found = denoiser(noisy, 1 - timesteps / 1000, context, conditioning["attention_mask"])
        return found if self.chosen(FlowOptions).model_prediction_type == "additive" else -found

    # ---- memory and speed ----

    def attention(self, options: TrainingOptions) -> str:
        return "flash" if self.chosen(LuminaOptions).use_flash_attn else super().attention(options)

    def set_attention(self, denoiser: nn.Module, backend: str, *, split: bool = False) -> None:
        denoiser.set_attention(backend, split=split)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        denoiser.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            clip.enable_gradient_checkpointing(text_encoder)

    # ---- records ----

    def metadata(self, info: ModelInfo) -> dict[str, str]:
        return {"ss_v2": "False", "ss_base_model_version": info.version} | self.flow_metadata()

    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        # no prediction type, as published
        return RECORD.modelspec()


LUMINA = LuminaImage2()
