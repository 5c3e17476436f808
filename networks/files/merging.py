"""Merge adapters: all steps from the options to the written files, for every script that merges."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from library.architectures.adapters import AdapterFamily, AdapterNaming, ModelRecord
from library.config.work_progress import WorkProgress
from library.errors import UserError
from library.files.safetensors_io import is_pickle, read_header
from library.files.streamed import write_model
from networks.files.block_weights import BlockWeights
from networks.files.lora_file import LoraFile
from networks.files.merge_files import Combined, combine, concatenate
from networks.files.merge_model import find_changes, merging_reader
from networks.files.model_file import Model
from networks.files.records import adapter_metadata, merged_from, model_metadata
from networks.files.svd import RankOf
from networks.weights import sizes_of, write_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computing:
    """Dtypes and device of a merge; ``save_dtype`` None keeps each tensor's own."""

    precision: torch.dtype
    save_dtype: torch.dtype | None
    loading_device: torch.device = torch.device("cpu")
    working_device: torch.device = torch.device("cpu")


def open_files(
    paths: Sequence[str],
    ratios: Sequence[float],
    family: AdapterFamily | None,
    blocks: Sequence[BlockWeights | None] | None = None,
) -> list[LoraFile]:
    """Read the files with their strengths; without ``family``, all must be of the first file's family."""
    files: list[LoraFile] = []
    for number, (path, ratio) in enumerate(zip(paths, ratios, strict=True)):
        file = LoraFile.open(Path(path), ratio, family, blocks[number] if blocks else None)
        if files and files[0].family.parts != file.family.parts:
            raise UserError(
                f"{path}: it is for {file.family.title}, {files[0].path} for {files[0].family.title}; only adapters of "
                "one kind of model can be merged"
            )
        logger.info("%s: %s, %d modules, ratio %g", file.path, file.family.title, len(file.modules), ratio)
        files.append(file)
    return files


# ---- into a model ----


def check_model(model: Model, parts: Sequence[AdapterNaming], files: Sequence[LoraFile]) -> dict[str, list]:
    """Return what the files change in the parts that a model file holds; see ``find_changes``.

    Raises:
        UserError: something does not fit, or nothing is changed.
    """
    changes: dict[str, list] = {}
    for part in parts:
        if part.locate(model.shapes):
            changes |= find_changes(part, model.shapes, files, model.path)
    if not changes:
        titles = " or ".join(part.title for part in parts)
        raise UserError(f"{model.path}: none of the LoRA files has modules of the {titles} that it holds")
    logger.info("%s: %d of %d tensors are changed", model.path, len(changes), len(model.shapes))
    return changes


def say_what_is_left_out(files: Sequence[LoraFile], family: AdapterFamily, parts: Sequence[AdapterNaming]) -> None:
    """Log how many modules are left out because they belong to models that are not given."""
    given = [part.kohya for part in parts]
    for file in files:
        for part in family.parts:
            count = sum(module.part.kohya == part.kohya for module in file.modules.values())
            if count and part.kohya not in given:
                logger.info("%s: its %d modules of the %s are left out", file.path, count, part.title)


def merge_into_model(
    model: Model,
    changes: dict[str, list],
    target: Path,
    computing: Computing,
    *,
    flag: str,
    title: str,
    metadata: dict[str, str] | None,
) -> None:
    """Write the merged model tensor by tensor."""
    with WorkProgress(f"merging {title}", "tensors", simple=False) as progress, model.opened() as read:
        write_model(
            target,
            model,
            merging_reader(
                read,
                changes,
                loading_device=computing.loading_device,
                working_device=computing.working_device,
                precision=computing.precision,
                save_dtype=computing.save_dtype,
            ),
            flag=flag,
            dtype=computing.save_dtype,
            metadata=metadata,
            progress=progress.update,
        )


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; none for other files."""
    return {} if not path.is_file() or is_pickle(path) else dict(read_header(path).metadata)


def model_record_metadata(
    record: ModelRecord, target: Path, model: Path | None, files: Sequence[LoraFile]
) -> dict[str, str]:
    """Return the ``modelspec.*`` entries of a merged model."""
    own = [(model, metadata_of(model))] if model is not None else []
    sources = [*own, *((file.path, file.metadata) for file in files)]
    return model_metadata(record, title=target.stem, merged_from=merged_from(sources))


# ---- with each other ----


def merge_files(
    files: Sequence[LoraFile],
    target: Path,
    computing: Computing,
    *,
    modelspec: bool,
    concat: bool = False,
    rank_of: RankOf | None = None,
    conv_rank_of: RankOf | None = None,
    network_args: dict[str, str] | None = None,
) -> Combined:
    """Merge the files with each other, write the result, and log how exact it is."""
    settings = {"dtype": computing.precision, "device": computing.working_device}
    if concat:
        merged = concatenate(files, **settings)
    else:
        merged = combine(files, rank_of=rank_of, conv_rank_of=conv_rank_of, **settings)
    sizes = sizes_of(merged.tensors).values()
    recorded = next((file.metadata for file in files if file.metadata.get("ss_base_model_version")), {})
    versions = {v for file in files if (v := file.metadata.get("ss_base_model_version"))}
    if len(versions) > 1:
        logger.warning("the LoRA files were made for different models: %s", ", ".join(sorted(versions)))
    spec = next((file.metadata for file in files if file.metadata.get("modelspec.architecture")), recorded)
    family = files[0].family
    metadata = adapter_metadata(
        family.record_of({**recorded, **{k: v for k, v in spec.items() if k == "modelspec.architecture"}}),
        family.network_module,
        ranks=[size.rank for size in sizes],
        alphas=[size.alpha for size in sizes],
        title=target.stem,
        merged_from=merged_from((file.path, file.metadata) for file in files),
        modelspec=modelspec,
        network_args=None if network_args is None else json.dumps(network_args),
    )
    # what the first source says of its base model is more exact than what the family says
    metadata |= {key: recorded[key] for key in ("ss_v2", "ss_base_model_version") if key in recorded}
    write_weights(target, merged.tensors, computing.save_dtype, metadata)
    if merged.error:
        logger.info(
            "largest error of the ranks: %.3g of the change of %s",
            *(merged.error, merged.module),
        )
    else:
        logger.info("the result is the exact sum of the changes, apart from rounding")
    logger.info("saved: %s, %d modules", target, len(sizes))
    return merged
