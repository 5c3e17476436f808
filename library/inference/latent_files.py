"""Files of latents, as the denoiser sees them, with the settings of their image: to decode later or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.errors import UserError
from library.files import atomic
from library.files.safetensors_io import load_tensors, read_header, save_tensors

SUFFIX = ".safetensors"
#: the tensor in a file, (1, C, h, w) float32
NAME = "latent"


def write(path: Path, latents: Tensor, record: Mapping[str, str]) -> Path:
    """Write the latents (1, C, h, w) of one image with its settings."""
    atomic.make_folder(path.parent)
    save_tensors(path, {NAME: latents.float().cpu().contiguous()}, dict(record))
    return path


def read(path: Path, channels: int) -> tuple[Tensor, dict[str, str]]:
    """Return latents (1, C, h, w) and settings.

    Args:
        channels: of the family's latents.

    Raises:
        UserError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of latents")
    tensors = load_tensors(path)
    latents = tensors.get(NAME)
    if latents is None or latents.dim() != 4 or latents.shape[:2] != (1, channels):
        what = f"no tensor {NAME}" if latents is None else f"{NAME} has shape {list(latents.shape)}"
        raise UserError(f"{path}: not latents of this family ({what}, expected 1, {channels}, height, width)")
    return latents.float(), dict(read_header(path).metadata)
