"""Find checkpoints and VAEs of families with an LDM U-Net, and check what they have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from library.architectures.common.diffusers_folder import download_components, is_hub_id, read_json
from library.architectures.common.identity import add_weights
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import recognise_pipeline
from library.architectures.common.sources import diffusers_vae_source, in_file, vae_source
from library.architectures.common.tensor_files import TensorFile
from library.errors import UserError, did_you_mean, naming
from library.files.safetensors_io import PICKLE_SUFFIXES, save_pickle, save_tensors

MODEL_FLAG = "--pretrained_model_name_or_path"
LATENT_CHANNELS = 4


def locate(path_or_id: str, *, flag: str, components: tuple[str, ...]) -> Path:
    """Return the local file or folder that an option names; a Hub repository is downloaded.

    Raises:
        UserError: there is none.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    if is_hub_id(path_or_id) and not path_or_id.endswith(suffixes) and not path.parent.is_dir():
        return download_components(path_or_id, components, flag=flag)
    raise UserError(f"{flag} {path_or_id}: no such file or folder{_path_hint(path_or_id)}")


def _path_hint(given: str) -> str:
    """Return a hint on why a path does not exist, to append to the message."""
    if given.startswith(("http://", "https://")):
        return "; addresses are not fetched: download the file first, or give a Hub id, owner/name"
    if len(given) > 2 and given[0] in "\"'" and given[0] == given[-1]:
        return "; leave out the quotes around it"
    path = Path(given)
    return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])


def locate_part(given: str, flag: str, subfolder: str) -> Path:
    """Return the local file or folder that an option names for a part of the model; of a pipeline's folder its own.

    Args:
        subfolder: where a pipeline has the part.

    Raises:
        UserError: there is none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / subfolder if (path / subfolder).is_dir() else path
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{flag} {given}: no such file{did_you_mean(path.name, siblings)}")


def locate_model(path_or_id: str, components: tuple[str, ...]) -> Path:
    """Return the file or folder of the base model, see ``locate``.

    Raises:
        UserError: none is named, or there is none.
    """
    if not path_or_id:
        raise UserError(f"{MODEL_FLAG} is required: a checkpoint file, a Diffusers folder or a Hub id")
    path = locate(path_or_id, flag=MODEL_FLAG, components=components)
    if path.suffix == ".json" and path.is_file():
        raise UserError(f"{MODEL_FLAG} {path_or_id}: describes a model; give its folder, {path.parent}")
    return path


def check_pipeline(folder: Path, family: str) -> None:
    """Raise UserError for the folder of another family's pipeline; ``family`` is the name in ``recognise_pipeline``."""
    index = folder / "model_index.json"
    name = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    other = recognise_pipeline(name, family)
    if other is not None:
        raise UserError(f"{folder} is {other.what} ({name}); {other.remedy}")


def check_folder(folder: Path, *, family: str, title: str, needed: tuple[str, ...]) -> None:
    """Refuse Diffusers folders of other families, and incomplete ones.

    Args:
        family: name in ``recognise_pipeline``; ``title`` is its name in messages.
        needed: the parts' folders.
    """
    check_pipeline(folder, family)
    missing = [part for part in needed if not (folder / part / "config.json").is_file()]
    if missing:
        files = sorted(p.name for p in folder.glob("*.safetensors")) + sorted(p.name for p in folder.glob("*.ckpt"))
        hint = f'; did you mean the file "{folder / files[0]}"?' if files else ""
        if (folder / "config.json").is_file() and (folder.parent / "model_index.json").is_file():
            hint = f'; it is a part of a model; did you mean "{folder.parent}"?'
        raise UserError(f"{folder} is not a {title} folder: {missing[0]}/config.json is missing{hint}")


def choose_vae(path: Path, given: str | None, own: ModelSource | None, title: str) -> ModelSource:
    """Return the autoencoder of ``--vae``, else the checkpoint's own.

    Raises:
        UserError: neither is there, or it is of another family.
    """
    vae = vae_at(given) if given else own
    if vae is None:
        raise UserError(f"{path}: the file has no VAE; give one with --vae")
    channels = vae.config.get("latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"{vae.file.path}: this VAE has {channels} latent channels (SD 3 and FLUX have 16), {title} "
            f"needs {LATENT_CHANNELS}; give another --vae"
        )
    return vae


def vae_at(path_or_id: str, flag: str = "--vae") -> ModelSource:
    """Return the autoencoder that an option names: in a checkpoint, in its own file or folder, or on the Hub.

    Raises:
        UserError: nothing there, or no autoencoder in it.
    """
    path = locate(path_or_id, flag=flag, components=("vae", ""))
    with naming(flag, path):
        if path.is_dir():
            folder = path / "vae" if (path / "vae").is_dir() else path
            return diffusers_vae_source(folder)
        source = in_file(path, vae_source, TensorFile.open(path))
        if source is None:
            raise UserError(f"{path}: the file holds no VAE (no encoder.conv_in.weight)")
    return source


def vae_identity(source: ModelSource) -> str:
    """Return a digest of what latents depend on: the names, dtypes and bytes of the autoencoder's encoder.

    The same VAE in a checkpoint and in its own file has the same identity, and so do two VAEs that differ in the
    decoder only.
    """
    digest = hashlib.sha256()
    add_weights(digest, source, only=("encoder.", "quant_conv."))
    return f"sha256:{digest.hexdigest()}"


def folder_prediction(folder: Path) -> str | None:
    """Return the prediction type in the scheduler's configuration of a Diffusers folder, if there is one."""
    path = folder / "scheduler" / "scheduler_config.json"
    # configurations from before the setting existed mean epsilon
    return read_json(path).get("prediction_type", "epsilon") if path.is_file() else None


def check_prediction(title: str, recorded: str | None, where: str, *, v_parameterization: bool) -> None:
    """Raise UserError if --v_parameterization contradicts the prediction type ``recorded`` at ``where``."""
    if recorded is None or (recorded == "v_prediction") == v_parameterization:
        return
    remedy = "add --v_parameterization" if recorded == "v_prediction" else "drop --v_parameterization"
    raise UserError(f"{title} is trained for {recorded} ({where}); {remedy}")


#: channels that the U-Net of an inpainting model reads: latents, mask, latents of the kept part
INPAINTING_CHANNELS = 2 * LATENT_CHANNELS + 1
_accepted: ContextVar[tuple[int, ...]] = ContextVar("accepted", default=(LATENT_CHANNELS,))


@contextmanager
def accepting_inpainting() -> Iterator[None]:
    """Accept inpainting models within, for programs that generate with them."""
    token = _accepted.set((LATENT_CHANNELS, INPAINTING_CHANNELS))
    try:
        yield
    finally:
        _accepted.reset(token)


def check_unet_channels(path: Path, unet: ModelSource, family: str) -> None:
    """Refuse U-Nets that cannot be trained here, or not be generated with within ``accepting_inpainting``."""
    channels = unet.config.get("in_channels", LATENT_CHANNELS)
    if channels not in _accepted.get():
        raise UserError(
            f"{path} is an inpainting or other special model (its U-Net takes {channels} channels, not "
            f"{LATENT_CHANNELS}); use a plain {family} checkpoint"
        )


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write one original-layout file, ``.safetensors`` or ``.ckpt``.

    Args:
        dtype: cast floating-point tensors; None keeps them as they are.

    Raises:
        UserError: the file cannot be written.
    """
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, dict(tensors), dict(metadata or {}))
    else:
        save_pickle(path, {"state_dict": dict(tensors)})
