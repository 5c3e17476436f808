"""ControlNets of U-Nets in training: their start from the U-Net's file, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from library.architectures.common.controlnet import (
    SHARED,
    build_controlnet,
    unet_settings,
)
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.model_writing import LazyTensors, as_they_are, laid_out, write_tensors
from library.files.atomic import atomic_directory


def start_from_unet(unet: ModelSource, *, device: str) -> nn.Module:
    """Return a ControlNet in float32 with the weights of a U-Net's file where both have them.

    The file is read and not the loaded U-Net, whose weights may be in half precision, in fp8, or sharded.
    """
    with torch.device(device):
        controlnet = build_controlnet(unet_settings(unet.config))
    if device == "meta":
        return controlnet
    names = [n for n in unet.file_names() if any(name.startswith(SHARED) for name in unet.layout.model_names(n))]
    own = controlnet.state_dict()
    with torch.no_grad():
        for name, tensor in unet.layout.read(unet.file.read(names)):
            own.pop(name).copy_(tensor)
    if left := [name for name in own if name.startswith(SHARED)]:
        raise ValueError(f"the U-Net has no {left[0]} for its ControlNet")
    return controlnet


def write_controlnet_file(
    path: Path,
    controlnet: nn.Module,
    layout: TensorLayout,
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Write one ``.safetensors`` file, or a plain dict of tensors as ``.pt`` or ``.ckpt``."""
    write_tensors(path, laid_out(layout, controlnet.state_dict()), dtype=dtype, metadata=metadata)


def write_diffusers_controlnet(folder: Path, controlnet: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Write a folder that diffusers' ``from_pretrained`` reads: its configuration and its weights."""
    tensors: LazyTensors = as_they_are(controlnet.state_dict())
    with atomic_directory(folder) as inside:
        config = {name: value for name, value in json.loads(controlnet.to_json_string()).items() if name[:1] != "_"}
        record = {"_class_name": type(controlnet).__name__, **config}
        (inside / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_tensors(inside / "diffusion_pytorch_model.safetensors", tensors, dtype=dtype, metadata={"format": "pt"})
