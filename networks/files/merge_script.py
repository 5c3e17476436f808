"""Scripts that merge adapters into a single-file checkpoint or with each other: ``merge_lora.py`` and others."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from library.architectures.adapters import AdapterFamily, ModelRecord
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.errors import UserError
from library.files.precisions import COMPUTE, parse_precision
from library.files.streamed import check_target
from networks.files.block_weights import BlockWeights
from networks.files.families import family_named
from networks.files.merging import (
    Computing,
    check_model,
    merge_files,
    merge_into_model,
    model_record_metadata,
    open_files,
)
from networks.files.model_file import family_of, open_model
from networks.files.options import checked_ratios, required

logger = logging.getLogger(__name__)


def run(
    args: argparse.Namespace,
    families: Sequence[str],
    *,
    blocks: Sequence[BlockWeights | None] | None = None,
    concat: bool = False,
    modelspec: bool = True,
) -> None:
    """Merge as the options of ``add_merge_options`` and ``--sd_model`` say.

    Args:
        families: keys of the families that the script supports.
        blocks: factors for each block, for each file.

    Raises:
        UserError: before anything is written.
    """
    setup_console(ConsoleOptions())
    ratios = checked_ratios(args.models, args.ratios)
    target = required("save_to", args.save_to, "say where to save the result")
    sources = [Path(path) for path in [*args.models, *([args.sd_model] if args.sd_model else [])]]
    check_target(target, "--save_to", sources=sources)
    precision = parse_precision("--precision", args.precision, COMPUTE)
    save_dtype = parse_precision("--save_precision", args.save_precision, COMPUTE) if args.save_precision else precision
    computing = Computing(precision, save_dtype)
    if not args.sd_model:
        files = open_files(args.models, ratios, _only(families), blocks)
        if files[0].family.key not in families:
            titles = " or ".join(family_named(key).title for key in families)
            raise UserError(f"{files[0].path}: it is for {files[0].family.title}; this script is for {titles}")
        merge_files(files, target, computing, modelspec=modelspec, concat=concat)
        return
    if concat:
        logger.warning("--concat has no effect where LoRA files are merged into a model")
    model = open_model(Path(args.sd_model))
    if Path(args.sd_model).is_dir():
        raise UserError(
            f"--sd_model {args.sd_model}: a folder; convert it to one file first, with "
            "tools/convert_diffusers20_original_sd.py"
        )
    family = family_of(model)
    if family.key not in families:
        titles = " or ".join(family_named(key).title for key in families)
        raise UserError(f"--sd_model {args.sd_model}: it is {family.title}; this script is for {titles}")
    files = open_files(args.models, ratios, family, blocks)
    changes = check_model(model, family.parts, files)
    metadata = None
    if modelspec:
        metadata = model_record_metadata(_record(family.records), target, Path(args.sd_model), files)
    merge_into_model(model, changes, target, computing, flag="--save_to", title=family.title, metadata=metadata)


def _only(families: Sequence[str]) -> AdapterFamily | None:
    """Return the family if there is one alone; with several the files say which it is."""
    return family_named(families[0]) if len(families) == 1 else None


def _record(records: Sequence[ModelRecord]) -> ModelRecord:
    """Return the metadata of the result; no tensor tells what Stable Diffusion 2.x predicts."""
    record = records[0]
    if record.v2:
        logger.warning("the metadata say that the model predicts v, as most of %s do", record.architecture)
    return record
