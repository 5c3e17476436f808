"""Find the size that a model was trained at, from its file or folder."""

from __future__ import annotations

import re
from pathlib import Path

from library.architectures.common.diffusers_folder import read_json
from library.files.safetensors_io import is_pickle, read_header

#: pixels per latent cell, the unit of ``sample_size`` of a Diffusers U-Net
_CELL = 8


def native_size(model: Path, default: str) -> tuple[int, int]:
    """Return (W, H) in pixels: a Diffusers folder's U-Net ``sample_size``, or a file's ``modelspec.resolution``.

    Args:
        default: ``<W>x<H>`` of the family.
    """
    config = model / "unet" / "config.json"
    if config.is_file():
        cells = read_json(config).get("sample_size")
        if isinstance(cells, int) and cells > 0:
            return cells * _CELL, cells * _CELL
    elif model.suffix == ".safetensors" and model.is_file() and not is_pickle(model):
        said = re.fullmatch(r"(\d+)x(\d+)", read_header(model).metadata.get("modelspec.resolution", ""))
        if said and min(int(side) for side in said.groups()) > 0:
            return int(said[1]), int(said[2])
    width, height = default.split("x")
    return int(width), int(height)
