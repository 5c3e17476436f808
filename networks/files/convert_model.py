"""Convert whole models between single files and diffusers folders, with what their family says of both."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.architectures.base import Architecture
from library.architectures.common.checkpoint import folder_prediction
from library.architectures.common.diffusers_folder import download_components, is_hub_id, preferring
from library.architectures.common.model_writing import own_tensors, write_file
from library.architectures.common.pipeline_writing import Pipeline, write_pipeline
from library.architectures.registry import FOLDERS, about, architectures
from library.config.work_progress import WorkProgress
from library.errors import UserError, naming
from library.files.safetensors_io import PICKLE_SUFFIXES, is_pickle
from library.files.streamed import check_folder_of, check_target, write_model
from networks.files.model_file import family_of, open_model

logger = logging.getLogger(__name__)

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class Conversion:
    """A conversion to do.

    Attributes:
        dtype: to save in; None keeps each tensor's own.
        metadata: of a safetensors file.
        counters: added to the counters of a ``.ckpt``.
        expected: key of the adapter family that the source must have; None for any.
        variant: which weights of a folder to read.
        reference: folder or Hub id with the tokenizer and the scheduler of a folder to write.
        safetensors: whether the files of a folder are safetensors.
    """

    source: str
    target: Path
    dtype: torch.dtype | None
    metadata: Mapping[str, str]
    counters: Mapping[str, int]
    expected: str | None = None
    variant: str | None = None
    reference: str | None = None
    safetensors: bool = False


def convert_model(wanted: Conversion) -> None:
    """Convert a model, and log what was written.

    Raises:
        UserError: the source is missing or of no family that has both forms, or the target cannot be written.
    """
    with preferring(wanted.variant):
        _convert(wanted)


def _convert(wanted: Conversion) -> None:
    path = _located(wanted)
    to_file = bool(wanted.target.suffix)
    if to_file:
        check_target(wanted.target, "the target", sources=[path], suffixes=(".safetensors", *PICKLE_SUFFIXES))
    else:
        check_folder_of(wanted.target, "the target")
        if wanted.target.exists() and (not wanted.target.is_dir() or any(wanted.target.iterdir())):
            raise UserError(f"{wanted.target}: exists already; name a new folder")
    model = open_model(path)
    family = family_of(model)
    if wanted.expected is not None and family.key != wanted.expected:
        raise UserError(f"{wanted.source}: it is {family.title}; leave out --v1 and --v2")
    logger.info("%s: %s", wanted.source, family.title)
    if to_file and path.is_file():
        _rewrite(model, path, wanted)
        return
    architecture, checkpoint, scheduler = _inspected(family.key, path, wanted)
    parts = architecture.sources(checkpoint)
    states = {name: own_tensors(source) for name, source in parts.items()}
    if to_file:
        tensors = architecture.single_file(parts, states)  # type: ignore[attr-defined]
        write_file(
            wanted.target, tensors, dtype=wanted.dtype, metadata=wanted.metadata, counters=_counted(path, wanted)
        )
    else:
        pipeline: Pipeline = architecture.pipeline(  # type: ignore[attr-defined]
            parts, states.__getitem__, architecture.load_tokenizers(checkpoint), checkpoint.info, scheduler
        )
        write_pipeline(wanted.target, pipeline, dtype=wanted.dtype, safetensors=wanted.safetensors)
    logger.info("saved: %s", wanted.target)


def _located(wanted: Conversion) -> Path:
    path = Path(wanted.source)
    if not path.exists() and is_hub_id(wanted.source):
        path = download_components(wanted.source, _PARTS, flag="the source")
    if not path.exists():
        raise UserError(f"{wanted.source}: no such file or folder")
    if wanted.variant is not None:
        if not path.is_dir():
            raise UserError(f"--variant {wanted.variant}: only folders have variants of their weights; leave it out")
        if not any(path.glob(f"*/*.{wanted.variant}.*")):
            raise UserError(f"--variant {wanted.variant}: {wanted.source} has no such weights; leave it out")
    return path


def _rewrite(model: Any, path: Path, wanted: Conversion) -> None:
    """Write a single file again: in another dtype, or as safetensors instead of a pickle and the other way round."""
    if wanted.target.suffix == ".safetensors":
        with WorkProgress("converting", "tensors", simple=False) as progress, model.opened() as read:
            write_model(
                wanted.target,
                model,
                read,
                flag="the target",
                dtype=wanted.dtype,
                metadata=wanted.metadata,
                progress=progress.update,
            )
        return
    from library.architectures.common.model_writing import whole_file

    counters = _counted(path, wanted)
    write_file(wanted.target, whole_file(model), dtype=wanted.dtype, metadata={}, counters=counters)
    logger.info("saved: %s", wanted.target)


def _counted(path: Path, wanted: Conversion) -> dict[str, int]:
    """Return the counters plus those of a pickled source."""
    own: Mapping[str, Any] = {}
    if path.is_file() and is_pickle(path):
        try:
            loaded = torch.load(path, map_location="meta", weights_only=True)
            own = loaded if isinstance(loaded, Mapping) else {}
        except (RuntimeError, pickle.UnpicklingError, ValueError):
            own = {}  # only a plain file has counters that can be read safely
    return {
        name: value + (n if isinstance(n := own.get(name, 0), int) else 0) for name, value in wanted.counters.items()
    }


def _inspected(key: str, path: Path, wanted: Conversion) -> tuple[Architecture, Any, Path | None]:
    """Return the family, its checkpoint, and the folder whose scheduler is kept."""
    place = next(folder for folder in FOLDERS if key in about(folder).adapter_keys)
    architecture = next(one for one in architectures() if one.name == place)
    if not hasattr(architecture, "pipeline"):
        raise UserError(
            f"{wanted.source}: there is no diffusers folder to convert it to or from here; see docs/flux_tools.md"
        )
    reference = path if path.is_dir() else None
    if wanted.reference is not None:
        reference = Path(wanted.reference)
        if not reference.exists() and is_hub_id(wanted.reference):
            reference = download_components(wanted.reference, ("tokenizer", "scheduler"), flag="--reference_model")
        if not (reference / "tokenizer").is_dir():
            raise UserError(f"--reference_model {wanted.reference}: has no folder tokenizer")
    recorded = None if reference is None else folder_prediction(reference)
    is_v2 = key == "sd2"
    # a single file of Stable Diffusion 2.x does not say which; most predict v
    predicts_v = recorded == "v_prediction" if recorded is not None else is_v2 or _says_v(path)
    with naming("the source", wanted.source):
        checkpoint = architecture.inspect(
            str(path),
            v2=is_v2,
            v_parameterization=predicts_v,
            vae=None,
            tokenizer_cache_dir=None if reference is None else str(reference / "tokenizer"),
        )
    return architecture, checkpoint, reference


def _says_v(path: Path) -> bool:
    return path.is_file() and "v_pred" in open_model(path).shapes
