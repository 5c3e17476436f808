"""Find the models of a checkpoint with an LDM U-Net: in one original file, or in a Diffusers folder.

Key maps: ``ldm_unet.py``, ``kl_vae.py``, ``clip.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from library.architectures.common import clip, kl_vae, ldm_unet
from library.architectures.common.diffusers_folder import read_json, weight_file
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.tensor_files import Shapes, TensorFile
from library.errors import UserError

Found = TypeVar("Found")
AnyFile = TypeVar("AnyFile")

_UNET_NAMES = (
    "conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks",
)  # fmt: skip


def in_file(path: Path, find: Callable[[AnyFile], Found], file: AnyFile) -> Found:
    """Call ``find(file)`` and add the file's name to its errors."""
    try:
        return find(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- one original file ----


def ldm_unet_source(file: TensorFile) -> ModelSource:
    config = ldm_unet.infer_unet_config(file.shapes)
    return ModelSource("U-Net", file, ldm_unet.ldm_unet_layout(config), config)


def vae_source(file: TensorFile) -> ModelSource | None:
    """Return the autoencoder in a checkpoint or in its own file, with LDM or diffusers names; None if there is none."""
    for prefix in (kl_vae.LDM_PREFIX, "", "vae."):
        if f"{prefix}encoder.conv_in.weight" not in file.shapes:
            continue
        config = kl_vae.infer_vae_config(file.shapes, prefix=prefix)
        if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in file.shapes:
            return ModelSource("VAE", file, kl_vae.diffusers_vae_layout(file.shapes, prefix=prefix), config)
        return ModelSource("VAE", file, kl_vae.ldm_vae_layout(config, prefix=prefix), config)
    return None


def clip_prefix(shapes: Shapes, root: str) -> str:
    """Return the prefix of CLIP's tensors: most files have ``text_model.``, some have nothing below ``root``."""
    return root + (clip.TEXT_MODEL if any(name.startswith(root + clip.TEXT_MODEL) for name in shapes) else "")


# ---- Diffusers folders ----


def diffusers_unet_source(folder: Path) -> ModelSource:
    file = TensorFile.open(weight_file(folder))
    layout = TensorLayout(KeyMap((name, name) for name in _UNET_NAMES))
    return ModelSource("U-Net", file, layout, read_json(folder / "config.json"))


def diffusers_text_source(folder: Path, *, projection: bool = False) -> ModelSource:
    """Args: ``projection`` for ``CLIPTextModelWithProjection``."""
    file = TensorFile.open(weight_file(folder))
    if projection:
        layout = clip.clip_layout(prefix="", projection=True)
    else:
        layout = clip.clip_layout(prefix=clip_prefix(file.shapes, ""))
    return ModelSource("text encoder", file, layout, read_json(folder / "config.json"))


def diffusers_vae_source(folder: Path) -> ModelSource:
    file = TensorFile.open(weight_file(folder))
    return ModelSource("VAE", file, kl_vae.diffusers_vae_layout(file.shapes), read_json(folder / "config.json"))
