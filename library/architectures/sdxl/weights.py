"""Read the text encoders of a single-file SDXL checkpoint, and write such files.

``common/sources.py`` finds the other parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.architectures.common import clip, kl_vae, ldm_unet
from library.architectures.common.checkpoint import write_checkpoint
from library.architectures.common.key_map import TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.model_writing import LazyTensors, as_they_are, laid_out
from library.architectures.common.sources import clip_prefix
from library.architectures.common.tensor_files import TensorFile
from library.errors import UserError

TEXT_1 = "conditioner.embedders.0.transformer."  # CLIP ViT-L, with transformers' names
TEXT_2 = "conditioner.embedders.1.model."  # OpenCLIP ViT-bigG
LOGIT_SCALE = f"{TEXT_2}logit_scale"  # of OpenCLIP's training; no model here has it


def text_1_source(file: TensorFile) -> ModelSource:
    prefix = clip_prefix(file.shapes, TEXT_1)
    config = clip.infer_clip_config(file.shapes, prefix=prefix, activation="quick_gelu")
    return ModelSource("text encoder 1", file, clip.clip_layout(prefix=prefix), config)


def text_2_source(file: TensorFile) -> ModelSource:
    config = clip.infer_openclip_config(file.shapes, prefix=TEXT_2, unused_layers=0)
    projection = file.shapes.get(TEXT_2 + clip.PROJECTION)
    if projection is None:
        raise UserError(f"{TEXT_2}{clip.PROJECTION} is missing; download the file again")
    layout = clip.openclip_layout(config["num_hidden_layers"], prefix=TEXT_2, projection=True)
    return ModelSource("text encoder 2", file, layout, {**config, "projection_dim": projection[1]})


def layouts(parts: Mapping[str, ModelSource]) -> dict[str, TensorLayout]:
    """Return the places of the parts in a file in the original layout."""
    layers = parts["text_encoder_2"].config["num_hidden_layers"]
    return {
        "denoiser": ldm_unet.ldm_unet_layout(parts["denoiser"].config),
        "vae": kl_vae.ldm_vae_layout(parts["vae"].config),
        "text_encoder_1": clip.clip_layout(prefix=TEXT_1 + clip.TEXT_MODEL),
        "text_encoder_2": clip.openclip_layout(layers, prefix=TEXT_2, projection=True),
    }


def single_file(parts: Mapping[str, ModelSource], states: Mapping[str, Mapping[str, Tensor]]) -> LazyTensors:
    """A file in the original layout from a model that has none."""
    tensors: LazyTensors = {}
    for name, layout in layouts(parts).items():
        tensors |= laid_out(layout, states[name])
    norm = tensors[f"{TEXT_2}ln_final.weight"].make()
    return tensors | as_they_are({LOGIT_SCALE: norm.new_ones(())})


def save_checkpoint(
    path: Path,
    *,
    unet: nn.Module,
    text_encoders: tuple[nn.Module, nn.Module],
    vae: nn.Module,
    source: TensorFile | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one original-layout file, ``.safetensors`` or ``.ckpt``.

    Loading a file and saving it in its own dtype gives the same tensors bit for bit, without ``position_ids``.

    Args:
        source: the single file the models came from, for ``logit_scale``, which no model holds; 1 without one.
        dtype: cast floating-point tensors; None keeps the models' own.

    Raises:
        UserError: the file cannot be written.
    """
    first, second = text_encoders
    tensors = dict(ldm_unet.ldm_unet_layout(unet.config).write(unet.state_dict()))
    tensors |= kl_vae.ldm_vae_layout(vae.config).write(vae.state_dict())
    tensors |= clip.clip_layout(prefix=TEXT_1 + clip.TEXT_MODEL).write(first.state_dict())
    layers = second.config.num_hidden_layers
    tensors |= clip.openclip_layout(layers, prefix=TEXT_2, projection=True).write(second.state_dict())
    if source is not None and LOGIT_SCALE in source.shapes:
        tensors |= source.read([LOGIT_SCALE])
    else:
        tensors[LOGIT_SCALE] = tensors[f"{TEXT_2}ln_final.weight"].new_ones(())
    write_checkpoint(path, tensors, dtype=dtype, metadata=metadata)
