"""Recognising a Stable Diffusion 1.x/2.x checkpoint from headers and configurations, before any weight is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from library.architectures.base import ModelInfo
from library.architectures.common.diffusers_folder import download_components, is_hub_id, read_json
from library.architectures.common.identity import add_weights
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import recognise_pipeline, recognise_tensors
from library.architectures.common.tensor_files import PICKLE_SUFFIXES, TensorFile
from library.architectures.common.tokenizer_files import locate_tokenizer
from library.architectures.sd import weights
from library.errors import UserError, did_you_mean

Found = TypeVar("Found")

MODEL_FLAG = "--pretrained_model_name_or_path"
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LATENT_CHANNELS = 4
#: Hub repositories (and sub-folder) of the tokenizers; SD 2.x's differs from CLIP's in its padding only
CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", None)
TOKENIZERS = {False: (CLIP_TOKENIZER,), True: (("stabilityai/stable-diffusion-2", "tokenizer"), CLIP_TOKENIZER)}


@dataclass(frozen=True)
class SDCheckpoint:
    """A recognised checkpoint: what it is and where its parts lie."""

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
    """See ``Architecture.inspect``."""
    if not path_or_id:
        raise UserError(f"{MODEL_FLAG} is required: a checkpoint file, a Diffusers folder or a Hub id")
    path = _locate(path_or_id, flag=MODEL_FLAG, components=COMPONENTS)
    parts = _inspect_folder(path) if path.is_dir() else _inspect_file(path)
    title = Path(path_or_id).name or path_or_id  # a Hub id's snapshot has an unspeakable name
    _check_version(title, parts, v2=v2)
    _check_prediction(title, parts, v_parameterization=v_parameterization)
    own_vae = vae_at(vae) if vae else parts.vae
    if own_vae is None:
        raise UserError(f"{path}: the file has no VAE; give one with --vae")
    _check_vae(own_vae)
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


def vae_at(path_or_id: str) -> ModelSource:
    """The autoencoder that ``--vae`` names: in a checkpoint, in a file or folder of its own, or on the Hub.

    Raises:
        UserError: nothing there, or no autoencoder in it.
    """
    path = _locate(path_or_id, flag="--vae", components=("vae", ""))
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return weights.diffusers_vae_source(folder)
    source = _in_file(path, weights.vae_source, TensorFile.open(path))
    if source is None:
        raise UserError(f"--vae {path}: the file holds no VAE (no encoder.conv_in.weight)")
    return source


def vae_identity(source: ModelSource) -> str:
    """A digest of what latents depend on: the names, dtypes and bytes of the autoencoder's encoder.

    The same VAE in a checkpoint and in a file of its own has the same identity; so have two that differ in the decoder.
    """
    digest = hashlib.sha256()
    add_weights(digest, source, only=("encoder.", "quant_conv."))
    return f"sha256:{digest.hexdigest()}"


# ---- locating ----


def _locate(path_or_id: str, *, flag: str, components: tuple[str, ...]) -> Path:
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    if is_hub_id(path_or_id) and not path_or_id.endswith(suffixes) and not path.parent.is_dir():
        return download_components(path_or_id, components, flag=flag)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{flag} {path_or_id}: no such file or folder{did_you_mean(path.name, siblings)}")


# ---- recognising ----


@dataclass(frozen=True)
class _Parts:
    unet: ModelSource
    text_encoder: ModelSource
    vae: ModelSource | None
    v2: bool
    prediction_type: str | None  # what the file says, if it says it


def _inspect_file(path: Path) -> _Parts:
    file = TensorFile.open(path)
    names = file.shapes
    has_unet = any(name.startswith("model.diffusion_model.input_blocks.") for name in names)
    text = {v2: any(name.startswith(prefix) for name in names) for v2, prefix in _TEXT_PREFIXES.items()}
    if not has_unet or not any(text.values()):
        other = recognise_tensors(names.keys())
        if other is not None:
            raise UserError(f"{path} is {other.what}; {other.remedy}")
        if has_unet:
            raise UserError(f"{path} has a U-Net but no text encoder; give a whole Stable Diffusion checkpoint")
        first = next(iter(names), "none")
        raise UserError(f"{path} is not a Stable Diffusion checkpoint (its first tensor is {first})")
    v2 = text[True]
    unet = _in_file(path, weights.ldm_unet_source, file)
    if unet.config["use_linear_projection"] != v2:
        text_kind, unet_kind = ("2.x", "1.x") if v2 else ("1.x", "2.x")
        raise UserError(
            f"{path} mixes a Stable Diffusion {text_kind} text encoder with a {unet_kind} U-Net; the file is damaged"
        )
    text_encoder = _in_file(path, lambda f: weights.ldm_text_source(f, v2=v2), file)
    return _checked(path, _Parts(unet, text_encoder, _in_file(path, weights.vae_source, file), v2, None))


_TEXT_PREFIXES = {False: weights.V1_TEXT, True: weights.V2_TEXT}


def _inspect_folder(folder: Path) -> _Parts:
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    class_name = str(index.get("_class_name", ""))
    other = recognise_pipeline(class_name)
    if other is not None:
        raise UserError(f"{folder} is {other.what} ({class_name}); {other.remedy}")
    missing = [part for part in ("unet", "text_encoder", "vae") if not (folder / part / "config.json").is_file()]
    if missing:
        files = sorted(p.name for p in folder.glob("*.safetensors")) + sorted(p.name for p in folder.glob("*.ckpt"))
        hint = f'; did you mean the file "{folder / files[0]}"?' if files else ""
        raise UserError(f"{folder} is not a Stable Diffusion folder: {missing[0]}/config.json is missing{hint}")
    unet = weights.diffusers_unet_source(folder / "unet")
    prediction_type = None
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        # configurations from before the setting existed mean epsilon
        prediction_type = scheduler.get("prediction_type", "epsilon")
    text_encoder = weights.diffusers_text_source(folder / "text_encoder")
    vae = weights.diffusers_vae_source(folder / "vae")
    v2 = bool(unet.config.get("use_linear_projection", False))
    return _checked(folder, _Parts(unet, text_encoder, vae, v2, prediction_type))


def _checked(path: Path, parts: _Parts) -> _Parts:
    """Refuse U-Nets and text encoders that training here cannot drive."""
    config = parts.unet.config
    if config.get("in_channels", LATENT_CHANNELS) != LATENT_CHANNELS:
        raise UserError(
            f"{path} is an inpainting or other special model (its U-Net takes {config['in_channels']} channels, not "
            f"{LATENT_CHANNELS}); use a plain Stable Diffusion checkpoint"
        )
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


def _check_prediction(title: str, parts: _Parts, *, v_parameterization: bool) -> None:
    told = parts.prediction_type
    if told is None or (told == "v_prediction") == v_parameterization:
        return
    remedy = "add --v_parameterization" if told == "v_prediction" else "drop --v_parameterization"
    raise UserError(f"{title} is trained for {told} (scheduler/scheduler_config.json); {remedy}")


def _check_vae(source: ModelSource) -> None:
    channels = source.config.get("latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"{source.file.path}: this VAE has {channels} latent channels (SD 3 and FLUX have 16), Stable Diffusion "
            f"1.x/2.x needs {LATENT_CHANNELS}; give another --vae"
        )


def _in_file(path: Path, find: Callable[[TensorFile], Found], file: TensorFile) -> Found:
    """Call ``find(file)``; its errors get the file's name."""
    try:
        return find(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
