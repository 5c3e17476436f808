"""Read the text encoder of a single-file Stable Diffusion 1.x/2.x checkpoint, and write such files.

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

V1_TEXT = "cond_stage_model.transformer."
V2_TEXT = "cond_stage_model.model."
#: SD 2.x takes the penultimate OpenCLIP layer: the last block is stored but not used
V2_UNUSED_LAYERS = 1


def ldm_text_source(file: TensorFile, *, v2: bool) -> ModelSource:
    if v2:
        config = clip.infer_openclip_config(file.shapes, prefix=V2_TEXT, unused_layers=V2_UNUSED_LAYERS)
        layers = config["num_hidden_layers"]
        layout = clip.openclip_layout(layers, prefix=V2_TEXT)
        return ModelSource("text encoder", file, layout, config, (f"{V2_TEXT}transformer.resblocks.{layers}.",))
    prefix = clip_prefix(file.shapes, V1_TEXT)
    config = clip.infer_clip_config(file.shapes, prefix=prefix, activation="quick_gelu")
    return ModelSource("text encoder", file, clip.clip_layout(prefix=prefix), config)


# ---- writing ----


def save_checkpoint(
    path: Path,
    *,
    unet: nn.Module,
    text_encoder: nn.Module,
    vae: nn.Module,
    source: TensorFile | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one original-layout file, ``.safetensors`` or ``.ckpt``.

    Loading a file and saving it in its own dtype gives the same tensors bit for bit, without ``position_ids``.

    Args:
        source: the single file the models came from: SD 2.x's tensors that the models do not hold (the unused last
            block, ``text_projection``, ``logit_scale``) are copied from it. Without it they are placeholders, which no
            reader of SD 2.x uses.
        dtype: cast floating-point tensors; None keeps the models' own.

    Raises:
        UserError: the file cannot be written.
    """
    v2 = bool(unet.config["use_linear_projection"])
    tensors = dict(ldm_unet.ldm_unet_layout(unet.config).write(unet.state_dict()))
    tensors |= kl_vae.ldm_vae_layout(vae.config).write(vae.state_dict())
    if v2:
        layers = text_encoder.config.num_hidden_layers
        tensors |= clip.openclip_layout(layers, prefix=V2_TEXT).write(text_encoder.state_dict())
        tensors |= _unused_text_tensors(tensors, layers, source)
    else:
        tensors |= clip.clip_layout(prefix=V1_TEXT + clip.TEXT_MODEL).write(text_encoder.state_dict())
    write_checkpoint(path, tensors, dtype=dtype, metadata=metadata)


def layouts(parts: Mapping[str, ModelSource], *, v2: bool) -> dict[str, TensorLayout]:
    """Return the places of the parts in a file in the original layout."""
    text = parts["text_encoder_1"].config
    return {
        "denoiser": ldm_unet.ldm_unet_layout(parts["denoiser"].config),
        "vae": kl_vae.ldm_vae_layout(parts["vae"].config),
        "text_encoder_1": clip.openclip_layout(text["num_hidden_layers"], prefix=V2_TEXT)
        if v2
        else clip.clip_layout(prefix=V1_TEXT + clip.TEXT_MODEL),
    }


def single_file(
    parts: Mapping[str, ModelSource], states: Mapping[str, Mapping[str, Tensor]], *, v2: bool
) -> LazyTensors:
    """A file in the original layout from a model that has none."""
    tensors: LazyTensors = {}
    for name, layout in layouts(parts, v2=v2).items():
        tensors |= laid_out(layout, states[name])
    if v2:
        layers = parts["text_encoder_1"].config["num_hidden_layers"]
        text = {name: tensor.make() for name, tensor in tensors.items() if name.startswith(_stand_in_models(layers))}
        tensors |= as_they_are(_unused_text_tensors(text, layers, None))
    return tensors


def _stand_in_models(layers: int) -> tuple[str, ...]:
    """Return the prefixes of the tensors that stand-ins are copied from."""
    return (f"{V2_TEXT}transformer.resblocks.{layers - 1}.", f"{V2_TEXT}ln_final.")


def _unused_text_tensors(written: Mapping[str, Tensor], layers: int, source: TensorFile | None) -> dict[str, Tensor]:
    """Return SD 2.x's tensors that a file has and the models do not."""
    if source is not None:
        names = [name for name in source.shapes if name.startswith(V2_TEXT) and name not in written]
        if names:
            return dict(source.read([name for name in names if not name.endswith("attn_mask")]))
    last, unused = (f"{V2_TEXT}transformer.resblocks.{layer}." for layer in (layers - 1, layers))
    stand_ins = {unused + n[len(last) :]: t.clone() for n, t in written.items() if n.startswith(last)}
    norm = written[f"{V2_TEXT}ln_final.weight"]
    stand_ins[f"{V2_TEXT}text_projection"] = norm.new_ones(len(norm), len(norm))
    stand_ins[f"{V2_TEXT}logit_scale"] = norm.new_ones(())
    return stand_ins
