"""HunyuanImage-2.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.architectures.base import Architecture
from library.architectures.common import t5
from library.architectures.common.checkpoint import vae_identity
from library.architectures.common.flow_matching import FlowMatching
from library.architectures.common.identity import weights_identity
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.loading import without_mapping
from library.architectures.common.tokenizer_files import QWEN as QWEN_FILES
from library.architectures.common.tokenizer_files import find_tokenizer
from library.architectures.common.transformer_file import TransformerFile
from library.architectures.conditioning import CaptionLength, Conditioning, Control
from library.architectures.formats import LatentFormat, TextFormat
from library.architectures.hunyuan_image import qwen, text, vae
from library.architectures.hunyuan_image.adapters import RECORD
from library.architectures.hunyuan_image.checkpoint import HunyuanCheckpoint, inspect_model
from library.architectures.hunyuan_image.model import HunyuanImage
from library.architectures.hunyuan_image.names import LAYOUTS
from library.architectures.hunyuan_image.options import DECLARATION, HunyuanOptions
from library.architectures.hunyuan_image.targets import BYT5, QWEN
from library.architectures.hunyuan_image.targets import DENOISER as DENOISER_TARGET
from library.architectures.model_info import ModelInfo, WeightsIdentity
from library.architectures.part import DENOISER, VAE, Part, built_by, by_name, text_encoder_name

if TYPE_CHECKING:
    from transformers import ByT5Tokenizer

    from library.config.image_settings import ImageSettings

#: what projected guidance does, if nothing else is asked for; as published
GUIDANCE = {
    "apg_start_step_general": 5, "apg_start_step_ocr": 38, "guidance_rescale": 0.0, "guidance_rescale_apg": 0.0,
}  # fmt: skip


class HunyuanImage21(FlowMatching, TransformerFile, Architecture):
    """Tencent Hunyuan 2025, "HunyuanImage 2.1"."""

    name = "hunyuan_image"
    latent = LatentFormat(
        channels=vae.CHANNELS,
        stride=vae.STRIDE,
        scale=vae.SCALE,
        shift=0.0,
        cache_suffix="_hi.npz",
        multi_resolution=True,
        bucket_step=32,
    )
    text = TextFormat(
        cache_suffix="_hi_te.npz",
        arrays=text.ARRAYS,
        extras=text.published_extras,
        ragged=text.RAGGED,
        stored_lengths={"byt5_embed": text.GLYPH_LENGTH, "byt5_mask": text.GLYPH_LENGTH},
    )
    text_encoder_targets = (QWEN, BYT5)
    denoiser_target = DENOISER_TARGET
    compiled_blocks = ("MMDoubleStreamBlock", "MMSingleStreamBlock")
    declaration = DECLARATION
    length_option = ""
    sampling_shift = 5.0
    sample_defaults = MappingProxyType({"width": 512, "height": 512, "sample_steps": 20, "scale": 3.5})
    sample_size_step = 32
    guidance = "projected_guidance"

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
    ) -> HunyuanCheckpoint:
        own = self.chosen(HunyuanOptions)
        checkpoint = inspect_model(path_or_id, own, vae=vae, tokenizer_cache_dir=tokenizer_cache_dir)
        return without_mapping(checkpoint) if disable_mmap else checkpoint

    def load_tokenizers(self, checkpoint: HunyuanCheckpoint) -> list[Any]:
        return [qwen.load_tokenizer(checkpoint.tokenizer_folder), _byte_tokenizer()]

    def tokenizers_in(self, folder: Path, *, v2: bool) -> list[Any]:
        return [qwen.load_tokenizer(find_tokenizer(folder, QWEN_FILES)), _byte_tokenizer()]

    def parts(self, checkpoint: HunyuanCheckpoint) -> dict[str, Part]:
        own, sizes = self.chosen(HunyuanOptions), checkpoint.sizes
        place = "cpu" if own.text_encoder_cpu else None
        readers = (qwen.load_in_fp8 if own.fp8_vl else qwen.load_qwen, t5.load_t5)
        found = zip(checkpoint.text_encoders, readers, self.text_encoder_targets, strict=True)
        encoders = [
            Part(text_encoder_name(number), source, read, naming, device=place)
            for number, (source, read, naming) in enumerate(found, start=1)
        ]
        transformer = built_by(lambda _: HunyuanImage(sizes))
        denoiser = Part(DENOISER, checkpoint.transformer, transformer, self.denoiser_target, self.block_lists)
        autoencoder = partial(vae.load_vae, chunk_size=own.vae_chunk_size)
        return by_name(encoders, denoiser, Part(VAE, checkpoint.vae, autoencoder))

    def saved_layout(self, checkpoint: HunyuanCheckpoint) -> TensorLayout:
        return LAYOUTS.published()

    def block_lists(self, denoiser: nn.Module) -> Sequence[Sequence[nn.Module]]:
        return list(denoiser.double_blocks), list(denoiser.single_blocks)

    @property
    def blocks_to_swap(self) -> int:
        return self.chosen(HunyuanOptions).blocks_to_swap or 0

    def adapted_encoders(self, network: Any) -> tuple[bool, ...]:
        return (False, False)

    def vae_identity(self, checkpoint: HunyuanCheckpoint) -> str:
        return vae_identity(checkpoint.vae)

    def text_identity(self, checkpoint: HunyuanCheckpoint) -> WeightsIdentity:
        return weights_identity(checkpoint.text_encoders, (checkpoint.tokenizer_folder,))

    # ---- text ----

    def tokenize(
        self, tokenizers: Sequence[Any], captions: Sequence[str], *, max_token_length: int | None, weighted: bool
    ) -> dict[str, Tensor]:
        return text.tokenize(tokenizers, captions)

    def caption_length(
        self, tokenizers: Sequence[Any], caption: str, *, max_token_length: int | None, weighted: bool
    ) -> CaptionLength:
        return qwen.caption_length(tokenizers[0], caption)

    def encode_text(
        self, text_encoders: Sequence[nn.Module], tokens: Mapping[str, Tensor], *, clip_skip: int | None
    ) -> Conditioning:
        return text.encode_text(text_encoders, tokens)

    def guidance_settings(self, settings: ImageSettings) -> Mapping[str, Any]:
        """Return ``start``, ``rescale`` and ``rescale_projected`` of an image; text within it is guided longer."""
        own = {**GUIDANCE, **settings.own}
        quotes = bool(text.glyph_text(settings.prompt))
        return {
            "start": own["apg_start_step_ocr" if quotes else "apg_start_step_general"],
            "rescale": own["guidance_rescale"],
            "rescale_projected": own["guidance_rescale_apg"],
        }

    # ---- diffusion ----

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        # a single caption has no padding, see ``TextFormat.ragged``; attention without a mask is faster
        is_padded = len(noisy) > 1
        return denoiser(
            noisy,
            timesteps,
            conditioning["vlm_embed"].to(noisy.dtype),
            conditioning["vlm_mask"] if is_padded else None,
            conditioning["byt5_embed"].to(noisy.dtype),
            conditioning["byt5_mask"] if is_padded else None,
        )

    # ---- memory and speed ----

    def set_attention(self, denoiser: nn.Module, backend: str, *, split: bool = False) -> None:
        # torch's kernels are the default, as published, where other families compute the plain formula
        denoiser.set_attention("torch" if backend == "math" else backend, split=split)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
        denoiser.enable_gradient_checkpointing()

    # ---- records ----

    def metadata(self, info: ModelInfo) -> dict[str, str]:
        return {"ss_v2": "False", "ss_base_model_version": info.version} | self.flow_metadata()

    def modelspec(self, info: ModelInfo) -> dict[str, str]:
        # no prediction type, as that of FLUX.1: "epsilon", as published, would be wrong
        return RECORD.modelspec()


def _byte_tokenizer() -> ByT5Tokenizer:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


HUNYUAN_IMAGE = HunyuanImage21()
