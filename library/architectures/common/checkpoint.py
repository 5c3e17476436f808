"""Finding checkpoints and VAEs with an LDM U-Net, and what families check of them alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

from library.architectures.common.diffusers_folder import download_components, is_hub_id, read_json
from library.architectures.common.identity import add_weights
from library.architectures.common.loading import ModelSource
from library.architectures.common.sources import diffusers_vae_source, in_file, vae_source
from library.architectures.common.tensor_files import PICKLE_SUFFIXES, TensorFile
from library.errors import UserError, did_you_mean

MODEL_FLAG = "--pretrained_model_name_or_path"
LATENT_CHANNELS = 4


def locate(path_or_id: str, *, flag: str, components: tuple[str, ...]) -> Path:
    """The local file or folder that an option names; what is on the Hub is fetched.

    Raises:
        UserError: there is none.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    if is_hub_id(path_or_id) and not path_or_id.endswith(suffixes) and not path.parent.is_dir():
        return download_components(path_or_id, components, flag=flag)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{flag} {path_or_id}: no such file or folder{did_you_mean(path.name, siblings)}")


def vae_at(path_or_id: str) -> ModelSource:
    """The autoencoder that ``--vae`` names: in a checkpoint, in a file or folder of its own, or on the Hub.

    Raises:
        UserError: nothing there, or no autoencoder in it.
    """
    path = locate(path_or_id, flag="--vae", components=("vae", ""))
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return diffusers_vae_source(folder)
    source = in_file(path, vae_source, TensorFile.open(path))
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


def folder_prediction(folder: Path) -> str | None:
    """What the scheduler's configuration in a Diffusers folder says the model predicts, if it is there."""
    path = folder / "scheduler" / "scheduler_config.json"
    # configurations from before the setting existed mean epsilon
    return read_json(path).get("prediction_type", "epsilon") if path.is_file() else None


def check_prediction(title: str, told: str | None, where: str, *, v_parameterization: bool) -> None:
    """Raise UserError where --v_parameterization contradicts what is ``told`` at ``where``."""
    if told is None or (told == "v_prediction") == v_parameterization:
        return
    remedy = "add --v_parameterization" if told == "v_prediction" else "drop --v_parameterization"
    raise UserError(f"{title} is trained for {told} ({where}); {remedy}")


def check_unet_channels(path: Path, unet: ModelSource, family: str) -> None:
    """Refuse U-Nets that training cannot drive."""
    channels = unet.config.get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"{path} is an inpainting or other special model (its U-Net takes {channels} channels, not "
            f"{LATENT_CHANNELS}); use a plain {family} checkpoint"
        )


def check_vae(source: ModelSource, family: str) -> None:
    channels = source.config.get("latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"{source.file.path}: this VAE has {channels} latent channels (SD 3 and FLUX have 16), {family} "
            f"needs {LATENT_CHANNELS}; give another --vae"
        )
