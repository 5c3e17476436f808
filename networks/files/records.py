"""Metadata of files that were not trained: merged models, and adapters that were merged, extracted or resized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from library.architectures.adapters import ModelRecord
from library.files.modelspec import build_modelspec


def model_metadata(record: ModelRecord, *, title: str, merged_from: str | None = None) -> dict[str, str]:
    """Return the ``modelspec.*`` entries of a model's file.

    Args:
        merged_from: the files of which a merged model was made.
    """
    return _modelspec(record, "", title, merged_from)


def adapter_metadata(
    record: ModelRecord,
    module: str,
    *,
    ranks: Iterable[int],
    alphas: Iterable[float],
    title: str,
    merged_from: str | None,
    modelspec: bool,
    network_args: str | None = None,
) -> dict[str, str]:
    """Return the metadata of a LoRA that was not trained: what loaders need, and ``modelspec.*``.

    Args:
        module: the network module that reads the file.
        ranks, alphas: of the modules.
        modelspec: whether to write ``modelspec.*`` entries.
        network_args: as JSON.
    """
    entries = {
        "ss_v2": str(record.v2),
        "ss_base_model_version": record.base_version,
        "ss_network_module": module,
        "ss_network_dim": text_of(ranks),
        "ss_network_alpha": text_of(map(float, alphas)),
    }
    if network_args is not None:
        entries["ss_network_args"] = network_args
    return entries | (_modelspec(record, "/lora", title, merged_from) if modelspec else {})


def text_of(numbers: Iterable[float]) -> str:
    """Return the number that all modules share, or ``Dynamic``."""
    different = set(numbers)
    return str(different.pop()) if len(different) == 1 else "Dynamic"


def merged_from(files: Iterable[tuple[Path, Mapping[str, str]]]) -> str:
    """Return ``modelspec.merged_from``: the titles of the sources, or the names of their files; the model first."""
    return ", ".join(metadata.get("modelspec.title") or path.stem for path, metadata in files)


def _modelspec(record: ModelRecord, ending: str, title: str, merged: str | None) -> dict[str, str]:
    return build_modelspec(
        architecture_id=record.architecture + ending,
        implementation=record.implementation,
        title=title,
        resolution=None,
        default_resolution=record.resolution,
        prediction_type=record.prediction_type,
        merged_from=merged,
    )
