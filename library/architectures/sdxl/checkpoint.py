"""Recognize a Stable Diffusion XL checkpoint from headers and configurations, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.architectures.common.checkpoint import (
    MODEL_FLAG,
    check_folder,
    check_prediction,
    check_unet_channels,
    choose_vae,
    folder_prediction,
    locate_model,
)
from library.architectures.common.ldm_unet import SIZE_WIDTH
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import recognise_tensors, unknown
from library.architectures.common.sources import (
    diffusers_text_source,
    diffusers_unet_source,
    diffusers_vae_source,
    in_file,
    ldm_unet_source,
    vae_source,
)
from library.architectures.common.tensor_files import TensorFile
from library.architectures.common.tokenizer_files import locate_tokenizer
from library.architectures.model_info import ModelInfo
from library.architectures.sdxl import weights
from library.errors import UserError, naming

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
NUM_SIZES = 6  # (H, W) of the image, (top, left) of the crop, (H, W) of the target
#: Hub repositories (and sub-folder) of the tokenizers, which differ in their padding only
CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", None)
OPENCLIP_TOKENIZER = ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", None)
#: a tensor without values that single files of models trained for v-prediction carry by convention
V_MARK = "v_pred"


@dataclass(frozen=True)
class SDXLCheckpoint:
    """A recognized checkpoint: what it is and where its parts are."""

    info: ModelInfo
    path: str
    unet: ModelSource
    text_encoders: tuple[ModelSource, ModelSource]
    vae: ModelSource
    tokenizer_folders: tuple[Path, Path]


def inspect_checkpoint(
    path_or_id: str, *, v_parameterization: bool, vae: str | None, tokenizer_cache_dir: str | None
) -> SDXLCheckpoint:
    """Find and recognize the model; see ``Architecture.inspect``."""
    path = locate_model(path_or_id, COMPONENTS)
    with naming(MODEL_FLAG, path_or_id):
        parts = _inspect_folder(path) if path.is_dir() else _inspect_file(path)
        _check_widths(path, parts)
    title = Path(path_or_id).name or path_or_id  # the snapshot folder of a Hub id has a cryptic name
    check_prediction(title, parts.prediction_type, parts.prediction_from, v_parameterization=v_parameterization)
    own_vae = choose_vae(path, vae, parts.vae, "Stable Diffusion XL")
    info = ModelInfo(
        family="sdxl",
        version="sdxl_base_v1-0",
        description=f"Stable Diffusion XL, {'v' if v_parameterization else 'epsilon'} prediction",
        v_prediction=v_parameterization,
    )
    tokenizers = _locate_tokenizers(path, tokenizer_cache_dir)
    return SDXLCheckpoint(info, str(path), parts.unet, parts.text_encoders, own_vae, tokenizers)


@dataclass(frozen=True)
class _Parts:
    unet: ModelSource
    text_encoders: tuple[ModelSource, ModelSource]
    vae: ModelSource | None
    prediction_type: str | None  # from the file, if it has it
    prediction_from: str  # the place in the file


def _inspect_file(path: Path) -> _Parts:
    file = TensorFile.open(path)
    names = file.shapes
    needed = {
        "U-Net": "model.diffusion_model.label_emb.",
        "first text encoder": weights.TEXT_1,
        "second text encoder": weights.TEXT_2,
    }
    missing = [what for what, prefix in needed.items() if not any(name.startswith(prefix) for name in names)]
    if missing:
        other = recognise_tensors(names.keys(), "sdxl")
        if other is not None and len(missing) == len(needed):
            raise UserError(f"{path} is {other.what}; {other.remedy}")
        if len(missing) < len(needed):
            is_refiner = other is not None and "refiner" in other.what
            why = (
                f"{path} is {other.what}; {other.remedy}"
                if is_refiner and other is not None
                else (f"{path} has no {' and no '.join(missing)}; give a whole Stable Diffusion XL checkpoint")
            )
            raise UserError(why)
        raise unknown(path, names.keys(), "Stable Diffusion XL checkpoint")
    encoders = (in_file(path, weights.text_1_source, file), in_file(path, weights.text_2_source, file))
    prediction = "v_prediction" if V_MARK in names else None
    vae = in_file(path, vae_source, file)
    return _Parts(in_file(path, ldm_unet_source, file), encoders, vae, prediction, f'its tensor "{V_MARK}"')


def _inspect_folder(folder: Path) -> _Parts:
    check_folder(
        folder, family="sdxl", title="Stable Diffusion XL", needed=("unet", "text_encoder", "text_encoder_2", "vae")
    )
    unet = diffusers_unet_source(folder / "unet")
    encoders = (
        diffusers_text_source(folder / "text_encoder"),
        diffusers_text_source(folder / "text_encoder_2", projection=True),
    )
    vae = diffusers_vae_source(folder / "vae")
    return _Parts(unet, encoders, vae, folder_prediction(folder), "scheduler/scheduler_config.json")


def _check_widths(path: Path, parts: _Parts) -> None:
    """Refuse U-Nets and text encoders that do not match, or cannot be trained here."""
    check_unet_channels(path, parts.unet, "Stable Diffusion XL")
    config, (first, second) = parts.unet.config, parts.text_encoders
    text = first.config["hidden_size"] + second.config["hidden_size"]
    if text != config["cross_attention_dim"]:
        raise UserError(
            f"{path}: the U-Net takes text of width {config['cross_attention_dim']}, the text encoders give {text} "
            "together; the file or folder mixes two models"
        )
    sizes = NUM_SIZES * (config.get("addition_time_embed_dim") or SIZE_WIDTH)
    pooled = (config.get("projection_class_embeddings_input_dim") or 0) - sizes
    if pooled != second.config["projection_dim"]:
        raise UserError(
            f"{path}: the U-Net takes pooled text of width {pooled}, text encoder 2 gives "
            f"{second.config['projection_dim']}; the file or folder is of another model"
        )


def _locate_tokenizers(path: Path, cache_dir: str | None) -> tuple[Path, Path]:
    folder = path if path.is_dir() else None
    first = locate_tokenizer((CLIP_TOKENIZER,), model_folder=folder, cache_dir=cache_dir)
    second = locate_tokenizer(
        (OPENCLIP_TOKENIZER, CLIP_TOKENIZER), model_folder=folder, cache_dir=cache_dir, subfolder="tokenizer_2"
    )
    return first, second
