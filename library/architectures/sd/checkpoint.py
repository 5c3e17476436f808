"""Recognize a Stable Diffusion 1.x/2.x checkpoint from headers and configurations, before any weight is read."""

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
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import refuse_other, unknown
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
from library.architectures.sd import weights
from library.errors import UserError, naming

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
#: Hub repositories (and sub-folder) of the tokenizers; SD 2.x's differs from CLIP's in its padding only
CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", None)
TOKENIZERS = {False: (CLIP_TOKENIZER,), True: (("stabilityai/stable-diffusion-2", "tokenizer"), CLIP_TOKENIZER)}


@dataclass(frozen=True)
class SDCheckpoint:
    """A recognized checkpoint: what it is and where its parts are."""

    info: ModelInfo
    path: str
    unet: ModelSource
    text_encoder: ModelSource
    vae: ModelSource
    tokenizer_folder: Path

    @property
    def v2(self) -> bool:
        return self.info.settings["v2"]


def inspect_checkpoint(
    path_or_id: str, *, v2: bool, v_parameterization: bool, vae: str | None, tokenizer_cache_dir: str | None
) -> SDCheckpoint:
    """Find and recognize the model; see ``Architecture.inspect``."""
    path = locate_model(path_or_id, COMPONENTS)
    with naming(MODEL_FLAG, path_or_id):
        parts = _inspect_folder(path) if path.is_dir() else _inspect_file(path)
    title = Path(path_or_id).name or path_or_id  # the snapshot folder of a Hub id has a cryptic name
    _check_version(title, parts, v2=v2)
    check_prediction(
        title, parts.prediction_type, "scheduler/scheduler_config.json", v_parameterization=v_parameterization
    )
    own_vae = choose_vae(path, vae, parts.vae, "Stable Diffusion 1.x/2.x")
    tokenizer_folder = locate_tokenizer(
        TOKENIZERS[v2], model_folder=path if path.is_dir() else None, cache_dir=tokenizer_cache_dir
    )
    generation = "2.x" if v2 else "1.x"
    info = ModelInfo(
        family="sd",
        version=("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else ""),
        description=f"Stable Diffusion {generation}, {'v' if v_parameterization else 'epsilon'} prediction",
        v_prediction=v_parameterization,
        settings={
            "v2": v2,
            "cross_attention_dim": parts.unet.config["cross_attention_dim"],
            "text_layers": parts.text_encoder.config["num_hidden_layers"],
        },
    )
    return SDCheckpoint(info, str(path), parts.unet, parts.text_encoder, own_vae, tokenizer_folder)


# ---- recognising ----


@dataclass(frozen=True)
class _Parts:
    unet: ModelSource
    text_encoder: ModelSource
    vae: ModelSource | None
    v2: bool
    prediction_type: str | None  # from the file, if it has it


def _inspect_file(path: Path) -> _Parts:
    file = TensorFile.open(path)
    names = file.shapes
    has_unet = any(name.startswith("model.diffusion_model.input_blocks.") for name in names)
    text = {v2: any(name.startswith(prefix) for name in names) for v2, prefix in _TEXT_PREFIXES.items()}
    if not has_unet or not any(text.values()):
        refuse_other(path, names.keys(), "sd")
        if has_unet:
            raise UserError(f"{path} has a U-Net but no text encoder; give a whole Stable Diffusion checkpoint")
        raise unknown(path, names.keys(), "Stable Diffusion checkpoint")
    v2 = text[True]
    unet = in_file(path, ldm_unet_source, file)
    if unet.config["use_linear_projection"] != v2:
        text_kind, unet_kind = ("2.x", "1.x") if v2 else ("1.x", "2.x")
        raise UserError(
            f"{path} mixes a Stable Diffusion {text_kind} text encoder with a {unet_kind} U-Net; the file is damaged"
        )
    text_encoder = in_file(path, lambda f: weights.ldm_text_source(f, v2=v2), file)
    return _checked(path, _Parts(unet, text_encoder, in_file(path, vae_source, file), v2, None))


_TEXT_PREFIXES = {False: weights.V1_TEXT, True: weights.V2_TEXT}


def _inspect_folder(folder: Path) -> _Parts:
    check_folder(folder, family="sd", title="Stable Diffusion", needed=("unet", "text_encoder", "vae"))
    unet = diffusers_unet_source(folder / "unet")
    text_encoder = diffusers_text_source(folder / "text_encoder")
    vae = diffusers_vae_source(folder / "vae")
    v2 = bool(unet.config.get("use_linear_projection", False))
    return _checked(folder, _Parts(unet, text_encoder, vae, v2, folder_prediction(folder)))


def _checked(path: Path, parts: _Parts) -> _Parts:
    """Refuse U-Nets and text encoders that cannot be trained here."""
    config = parts.unet.config
    check_unet_channels(path, parts.unet, "Stable Diffusion")
    width = parts.text_encoder.config.get("hidden_size")
    if width != config["cross_attention_dim"]:
        raise UserError(
            f"{path}: the U-Net takes text of width {config['cross_attention_dim']}, the text encoder gives {width}; "
            "the file or folder mixes two models"
        )
    return parts


def _check_version(title: str, parts: _Parts, *, v2: bool) -> None:
    if parts.v2 == v2:
        return
    generation, remedy = ("2.x", "add --v2") if parts.v2 else ("1.x", "drop --v2")
    width = parts.unet.config["cross_attention_dim"]
    raise UserError(f"{title} is a Stable Diffusion {generation} checkpoint (cross-attention width {width}); {remedy}")
