"""Convert ControlNets of U-Nets between their layouts; what a file lacks, or holds as a difference, is completed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from library.architectures.common import controlnet
from library.architectures.common.checkpoint import locate
from library.architectures.common.loading import ModelSource
from library.architectures.common.model_writing import laid_out, own_tensors, write_file
from library.architectures.common.sources import diffusers_unet_source, in_file, ldm_unet_source
from library.architectures.common.tensor_files import TensorFile
from library.errors import UserError, naming
from library.files.atomic import make_folder, write_text
from library.files.streamed import check_folder_of, check_target

MODEL_FLAG, TARGET_FLAG = "--model", "--save_to"
#: files of a folder in diffusers' form
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


@dataclass(frozen=True)
class ControlConversion:
    """A conversion to do.

    Attributes:
        model: checkpoint or diffusers folder of a model that the ControlNet is for.
        target: a file, or a folder for diffusers' form.
        names: "original" or "diffusers", of a file.
        dtype: to save in; None keeps each tensor's own.
    """

    source: str
    model: str
    target: Path
    names: str
    dtype: torch.dtype | None


def unet_of(path_or_id: str) -> ModelSource:
    """Return the U-Net of a checkpoint or a diffusers folder.

    Raises:
        UserError: nothing there, or a model without one.
    """
    path = locate(path_or_id, flag=MODEL_FLAG, components=("unet",))
    with naming(MODEL_FLAG, path_or_id):
        if path.is_dir():
            return diffusers_unet_source(path / "unet" if (path / "unet").is_dir() else path)
        return in_file(path, ldm_unet_source, TensorFile.open(path))


def convert_control(wanted: ControlConversion) -> list[str]:
    """Convert, and return lines on what was read and written.

    Raises:
        UserError: files that are missing or do not fit; a target that cannot be written.
    """
    unet = unet_of(wanted.model)
    source = controlnet.controlnet_source(wanted.source, unet, flag="the source")
    is_file = bool(wanted.target.suffix)
    if is_file:
        read = [Path(wanted.source), Path(wanted.model)]
        check_target(wanted.target, TARGET_FLAG, sources=read, suffixes=(".safetensors",))
    else:
        check_folder_of(wanted.target, TARGET_FLAG)
        if wanted.target.exists() and (not wanted.target.is_dir() or any(wanted.target.iterdir())):
            raise UserError(f"{TARGET_FLAG} {wanted.target}: exists already; name a new folder")
    with torch.device("meta"):
        model = controlnet.build_controlnet(source.config)
    tensors = own_tensors(source)
    if lacking := sorted(model.state_dict().keys() - tensors.keys()):
        raise UserError(f"{wanted.source}: lacks {len(lacking)} tensors of a ControlNet, such as {lacking[0]}")
    original = is_file and wanted.names == "original"
    layout = (
        controlnet.original_layout(source.config, prefix=controlnet.PUBLISHED_PREFIX)
        if original
        else controlnet.diffusers_layout()
    )
    place = wanted.target if is_file else wanted.target / WEIGHTS
    make_folder(place.parent)
    write_file(place, laid_out(layout, tensors), dtype=wanted.dtype, metadata={}, counters={})
    if not is_file:
        write_text(wanted.target / CONFIG, model.to_json_string())
    form = "the original names" if original else "diffusers' names" if is_file else "diffusers' form"
    return [f"{wanted.target}: {len(tensors)} tensors in {form}"]
