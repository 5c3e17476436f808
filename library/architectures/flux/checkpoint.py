"""Recognize, load and write the transformers of FLUX.1 and Chroma, and find CLIP-L in its own file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from library.architectures.common import clip
from library.architectures.common.checkpoint import check_pipeline, locate_model
from library.architectures.common.joined_layout import JoinedFile
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.common.recognise import refuse_other, refuse_scaled, unknown, what_it_is
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import is_shard, open_weights
from library.architectures.common.sources import clip_prefix, in_file
from library.architectures.common.tensor_files import Shapes, TensorFile, WeightFile
from library.architectures.flux.chroma import Chroma
from library.architectures.flux.diffusers_layout import (
    in_diffusers_layout,
    open_transformer,
)
from library.architectures.flux.model import Flux, FluxTransformer
from library.architectures.flux.names import CHROMA, DEV, SCHNELL, SIGN, TITLES, Variant, file_prefix
from library.architectures.flux.sizes import FluxSizes, infer_sizes
from library.errors import UserError
from library.files.safetensors_io import read_header, save_tensors, torch_dtype

#: values of --model_type
MODEL_TYPES = {DEV: "flux", SCHNELL: "flux", CHROMA: "chroma"}

_TOP = (
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "distilled_guidance_layer", "double_blocks",
    "single_blocks", "final_layer",
)  # fmt: skip


@dataclass(frozen=True)
class TransformerCheckpoint:
    """A recognized transformer: what it is and where it is."""

    kind: str  # DEV, SCHNELL or CHROMA
    sizes: FluxSizes
    source: ModelSource

    @property
    def model_type(self) -> str:
        return MODEL_TYPES[self.kind]

    @property
    def title(self) -> str:
        return TITLES[self.kind]


# ---- the transformer ----


def inspect_transformer(path_or_id: str) -> TransformerCheckpoint:
    """Find and recognize the transformer that --pretrained_model_name_or_path names, from its headers alone.

    It may be a file in the published or in diffusers' layout, one of several shards, the folder of a pipeline or of its
    transformer, or a Hub id.

    Raises:
        UserError: nothing there, or something else.
    """
    path = locate_model(path_or_id, ("transformer",))
    if path.is_dir():
        check_pipeline(path, "flux")
    elif not is_shard(path):
        file = TensorFile.open(path)
        if not in_diffusers_layout(file.shapes):
            return transformer_in(file)
    opened = open_transformer(path)
    if isinstance(opened, JoinedFile):
        return in_file(path, lambda found: described(found, published_layout(), found.shapes), opened)
    return transformer_in(opened)


def transformer_in(file: WeightFile) -> TransformerCheckpoint:
    """Return the transformer of one or several files in the published layout, with or without prefix.

    Raises:
        UserError: the file is something else or incomplete.
    """
    file = with_plain_numbers(file)
    refuse_other(file.path, file.shapes.keys(), "flux")
    prefix = file_prefix(file.shapes)
    if prefix + SIGN not in file.shapes:
        raise unknown(file.path, file.shapes.keys(), "FLUX.1 or Chroma transformer")
    shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    return in_file(file.path, lambda _: described(file, published_layout(prefix), shapes), file)


def described(file: WeightFile, layout: TensorLayout, shapes: Shapes) -> TransformerCheckpoint:
    """Return a transformer whose tensors are in ``file`` in the given ``layout``.

    Args:
        shapes: of its tensors by their published names, without prefix.

    Raises:
        UserError: they do not add up to a transformer.
    """
    refuse_scaled(shapes)
    sizes = infer_sizes(shapes)
    if sizes.in_channels != sizes.out_channels:
        raise UserError(
            f"this is FLUX.1 Fill, Canny, Depth or another special model (it takes {sizes.in_channels} channels for a "
            f"token and gives {sizes.out_channels}); give FLUX.1 dev, schnell or a model made from them"
        )
    return TransformerCheckpoint(
        Variant.of(shapes).kind, sizes, ModelSource("transformer", file, layout, {"sizes": sizes})
    )


def published_layout(prefix: str = "") -> TensorLayout:
    """Return the published layout; the models' own names are the published ones."""
    return TensorLayout(KeyMap((name, name) for name in _TOP), prefix)


def check_model_type(model_type: str, checkpoint: TransformerCheckpoint) -> None:
    """Raise UserError where --model_type contradicts the file."""
    if model_type != checkpoint.model_type:
        raise UserError(
            f"{checkpoint.source.file.path} is {checkpoint.title}, which contradicts --model_type {model_type}; "
            f"use --model_type {checkpoint.model_type}"
        )


def build_transformer(sizes: FluxSizes) -> FluxTransformer:
    return Flux(sizes) if sizes.approximator is None else Chroma(sizes)


def load_transformer(checkpoint: TransformerCheckpoint, *, dtype: torch.dtype, device: str) -> FluxTransformer:
    """Load ``Flux`` or ``Chroma``, frozen, in eval mode; streamed. An fp8 file is loaded in ``dtype``, without loss.

    Raises:
        UserError: tensors are missing or of other shapes.
    """
    model = load_frozen(checkpoint.source, partial(build_transformer, checkpoint.sizes), dtype=dtype, device=device)
    assert isinstance(model, FluxTransformer)
    return model


def save_transformer(
    path: Path,
    model: FluxTransformer,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a transformer in the published layout.

    Args:
        like: a file whose prefix and dtypes are used, tensor by tensor. Loading that file and saving it like itself
            gives the same tensors bit for bit, if the dtype of loading holds them all.
        dtype: cast to it; None keeps the model's own. Not used with ``like``.

    Raises:
        UserError: the file cannot be written.
    """
    names = read_header(like).tensors if like is not None else {}
    layout = published_layout(file_prefix(names))
    tensors = {}
    for name, tensor in layout.write(model.state_dict()):
        kind = torch_dtype(names[name], f"{like}: {name}") if name in names else dtype
        tensors[name] = tensor if kind is None else tensor.to(kind)
    save_tensors(path, tensors, metadata)


# ---- CLIP-L ----

#: before its names in files that hold a whole model, as ComfyUI writes them
BUNDLED_CLIP_L = "text_encoders.clip_l.transformer."


def clip_l_source(path: Path, *, flag: str = "--clip_l") -> ModelSource:
    """Return CLIP-L with transformers' names, with or without ``text_model.``; for ``build_clip``.

    It may be in a file of its own, in a folder, or in a file of a whole model.

    Raises:
        UserError: the file holds something else, or is incomplete.
    """
    file = open_weights(path)
    bundled = any(name.startswith(BUNDLED_CLIP_L) for name in file.shapes)
    prefix = clip_prefix(file.shapes, BUNDLED_CLIP_L if bundled else "")
    if f"{prefix}embeddings.token_embedding.weight" not in file.shapes:
        what = what_it_is(file.shapes.keys(), "clip", f"{clip.TEXT_MODEL}embeddings.token_embedding.weight")
        raise UserError(f"{flag} {path}: not a CLIP text encoder ({what}); give clip_l.safetensors")
    config = in_file(path, lambda f: clip.infer_clip_config(f.shapes, prefix=prefix, activation="quick_gelu"), file)
    return ModelSource("CLIP-L", file, clip.clip_layout(prefix=prefix), config)
