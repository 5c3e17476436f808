"""A Diffusers folder written: a sub-folder for each part, which ``from_pretrained`` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common.key_map import TensorLayout
from library.architectures.common.model_writing import laid_out, write_file
from library.files.atomic import atomic_directory
from library.files.safetensors_io import save_pickle


@dataclass(frozen=True)
class PipelinePart:
    """One sub-folder with weights."""

    folder: str  # "unet"
    library: str  # of its class: "diffusers" or "transformers"
    build: Callable[[], nn.Module]  # the model, for its configuration alone
    state: Callable[[], Mapping[str, Tensor]]
    layout: TensorLayout  # of the file in the sub-folder


@dataclass(frozen=True)
class Pipeline:
    """The content of a pipeline folder."""

    name: str  # of the pipeline's class
    parts: Sequence[PipelinePart]
    tokenizers: Mapping[str, Any]  # by their sub-folder
    #: name of the scheduler's class in diffusers, and its settings
    scheduler: tuple[str, Mapping[str, Any]]
    source: Path | None = None  # the folder that the model came from, whose scheduler is kept
    more: Mapping[str, Any] = ()  # type: ignore[assignment]  # further entries of model_index.json


#: names of weight files
_NAMES = {
    ("diffusers", True): "diffusion_pytorch_model.safetensors",
    ("diffusers", False): "diffusion_pytorch_model.bin",
    ("transformers", True): "model.safetensors",
    ("transformers", False): "pytorch_model.bin",
}


def write_pipeline(folder: Path, pipeline: Pipeline, *, dtype: torch.dtype | None, safetensors: bool) -> None:
    """Write the folder, whole or not at all.

    Args:
        dtype: cast floating-point tensors to it; ``None`` keeps each one's own.
        safetensors: otherwise weights are ``.bin`` files.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    import diffusers

    index: dict[str, Any] = {"_class_name": pipeline.name, "_diffusers_version": diffusers.__version__}
    with atomic_directory(folder) as target:
        for part in pipeline.parts:
            place = target / part.folder
            place.mkdir()
            kind = _write_config(part, place)
            index[part.folder] = [part.library, kind]
            _write_weights(part, place / _NAMES[part.library, safetensors], dtype=dtype)
        for name, tokenizer in pipeline.tokenizers.items():
            tokenizer.save_pretrained(str(target / name))
            index[name] = ["transformers", type(tokenizer).__name__]
        index["scheduler"] = ["diffusers", _write_scheduler(pipeline, target / "scheduler")]
        index |= dict(pipeline.more)
        (target / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _write_config(part: PipelinePart, place: Path) -> str:
    with torch.device("meta"):
        model = part.build()
    if part.library == "diffusers":
        model.save_config(str(place))
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(str(place))
    return type(model).__name__


def _write_weights(part: PipelinePart, path: Path, *, dtype: torch.dtype | None) -> None:
    tensors = laid_out(part.layout, part.state())
    if path.suffix == ".safetensors":
        write_file(path, tensors, dtype=dtype, metadata={"format": "pt"}, counters={})
        return
    made = {name: tensor.make().detach().to("cpu") for name, tensor in tensors.items()}
    if dtype is not None:
        made = {name: t.to(dtype) if t.is_floating_point() else t for name, t in made.items()}
    save_pickle(path, {name: tensor.contiguous().clone() for name, tensor in made.items()})


def _write_scheduler(pipeline: Pipeline, place: Path) -> str:
    """The source's own, or the published one of the family; returns its class name."""
    own = None if pipeline.source is None else pipeline.source / "scheduler"
    if own is not None and (own / "scheduler_config.json").is_file():
        shutil.copytree(own, place)
        found = json.loads((own / "scheduler_config.json").read_text(encoding="utf-8"))
        if name := found.get("_class_name"):
            return str(name)
    import diffusers

    name, settings = pipeline.scheduler
    getattr(diffusers, name)(**settings).save_pretrained(str(place))
    return name
