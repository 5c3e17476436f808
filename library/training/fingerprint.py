"""The properties that a resumed run must share with the run that saved the state, to be exact.

Every option counts unless its declaration marks it as harmless, so a new one cannot be forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from library.config.arguments import RunOptions
from library.data import describe
from library.data.bucketed import BucketedDataset
from library.data.dataset import TrainingData
from library.files.hashes import model_hash
from library.training.text_caching import text_cache_row

#: keys of a subset for paths and reading, which do not change the data
_HARMLESS_KEYS = frozenset(
    {"where", "image_dir", "metadata_file", "conditioning_dir", "cache_info", "on_bad_image", "validation_split",
     "validation_seed", "class_tokens", "caption_extension"}
)  # fmt: skip

_DIGEST = "sha256:"


def fingerprint(
    options: RunOptions,
    data: TrainingData,
    *,
    seed: int,
    batches_per_epoch: int,
    total_steps: int,
    processes: int,
    device: torch.device,
    optimizer: str,
    kind: Mapping[str, object],
) -> dict[str, object]:
    """Return name -> value, both for people; JSON values only.

    Args:
        optimizer: name and arguments.
        kind: entries of the kind of training.
    """
    caches_latents = options.dataset.cache_latents or options.dataset.cache_latents_to_disk
    found: dict[str, object] = {
        "seed": seed,
        "batches per epoch": batches_per_epoch,
        "total steps": total_steps,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "datasets": len(data.datasets),
        "validation images": describe.validation_set(data),
        "optimizer": optimizer,
        "latents cached": caches_latents,
        "text encoder outputs cached": text_cache_row(options.dataset),
        "base model": content_of(options.model.pretrained_model_name_or_path),
        "--vae": content_of(options.model.vae),
        **dict(option_values(options)),
        **kind,
    }
    if data.order == "by step":  # states of older versions do not say it
        # several processes had another order under the first of these names
        found["order of images"] = data.order if processes == 1 else "by step of all processes"
    for number, dataset in enumerate(data.datasets, start=1):
        found |= dataset_values(dataset, f"dataset {number}")
    return json.loads(json.dumps(found, default=str))  # as JSON returns it from the state


def option_values(options: RunOptions) -> Iterator[tuple[str, Any]]:
    """Return the options that matter. Data options are part of the datasets, where a dataset file may have changed
    them."""
    for group_field in dataclasses.fields(options):
        group = getattr(options, group_field.name)
        if getattr(type(group), "harmless", False):
            continue
        for field in dataclasses.fields(group):
            metadata = field.metadata
            if metadata["secret"] or metadata["harmless"]:
                continue
            value = getattr(group, field.name)
            yield f"--{field.name}", content_of(value) if metadata["weights"] else value


def dataset_values(dataset: BucketedDataset, name: str) -> dict[str, object]:
    """Return a dataset's settings one by one, and digests of its images, captions and masks."""
    records = dataset.records
    found: dict[str, object] = {
        # their index in the list is part of the identity of images
        f"images of {name}": digest(f"{r.subset} {r.name} {r.size}" for r in records),
        f"captions of {name}": digest(r.caption for r in records),
        f"masks of {name}": digest(r.conditioning.name if r.conditioning else "" for r in records),
    }
    settings = {field.name: getattr(dataset.spec, field.name) for field in dataclasses.fields(dataset.spec)}
    subsets = settings.pop("subsets")
    found |= {f"{key} of {name}": value for key, value in _flat(settings)}
    for number, subset in enumerate(subsets, start=1):
        found |= {f"{key} of {name}, subset {number}": value for key, value in _flat(vars(subset))}
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _HARMLESS_KEYS:
            continue
        if dataclasses.is_dataclass(value):
            yield from _flat(vars(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(lines: Iterable[str]) -> str:
    """Return one short text for many; messages only say that it changed."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode("utf-8", "surrogatepass") + b"\0")
    return f"{_DIGEST}{whole.hexdigest()[:16]}"


def is_digest(value: object) -> bool:
    return isinstance(value, str) and value.startswith(_DIGEST)


def content_of(path_or_id: str | None) -> str | None:
    """Identify a file by size and short hash, wherever it is; a folder by its files' sizes; a Hub id by its name."""
    if path_or_id is None or not Path(path_or_id).exists():
        return path_or_id
    path = Path(path_or_id)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    # the start of a small file too, which the short hash does not cover
    return digest(f"{f.relative_to(path)} {f.stat().st_size} {model_hash(f)} {_start(f)}" for f in files)


def _start(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(1 << 16)).hexdigest()
