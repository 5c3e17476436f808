"""Extract adapters: all steps from the options to the written file, for every script that extracts."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from library.architectures.adapters import AdapterFamily, ModelRecord
from library.config.work_progress import WorkProgress
from library.errors import UserError
from library.files.streamed import check_target
from networks.files.extract import Sizes, common_modules, extract, ranks_of, text_encoders_differ
from networks.files.model_file import Model, family_of, open_model
from networks.files.records import adapter_metadata
from networks.weights import write_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """A LoRA to extract.

    Attributes:
        min_diff: text encoders whose weights differ by no more are left out; None always leaves them out. save_dtype:
            of the LoRA.
    """

    before: Path
    after: Path
    target: Path
    sizes: Sizes
    device: torch.device
    save_dtype: torch.dtype
    min_diff: float | None
    modelspec: bool
    mapped: bool = True


def check_sizes(dim: int, conv_dim: int | None, clamp_quantile: float) -> Sizes:
    """Raise UserError for ranks and quantiles that are impossible."""
    for flag, rank in (("dim", dim), ("conv_dim", conv_dim)):
        if rank is not None and rank < 1:
            raise UserError(f"--{flag} {rank}: the rank is at least 1")
    if not 0 < clamp_quantile <= 1:
        raise UserError(f"--clamp_quantile {clamp_quantile}: is between 0 and 1; 1 cuts nothing")
    return Sizes(dim, conv_dim, clamp_quantile)


def open_pair(wanted: Extraction) -> tuple[Model, Model]:
    """Open both models, before anything is computed. Raises UserError for what cannot work."""
    check_target(wanted.target, "--save_to", sources=[wanted.before, wanted.after])
    if wanted.before.resolve() == wanted.after.resolve():
        raise UserError(f"the two models are both {wanted.before}; there is nothing to extract")
    before, after = (open_model(path, mapped=wanted.mapped) for path in (wanted.before, wanted.after))
    check_target(wanted.target, "--save_to", sources=before.files | after.files)
    return before, after


def run_extraction(
    wanted: Extraction,
    before: Model,
    after: Model,
    *,
    family: AdapterFamily | None = None,
    record: ModelRecord | None = None,
) -> None:
    """Extract and write the LoRA.

    Args:
        family: None for that of the first model.
        record: what the metadata say of the base model; None for what its tensors show.
    """
    family = family or family_of(before)
    record = record or family.record_of_model(before.shapes)
    convs = wanted.sizes.conv_rank is not None
    pairs = common_modules(before, after, family, convs=convs, text_encoders=wanted.min_diff is not None)
    logger.info("%s, %d modules, rank %d", record.architecture, len(pairs), wanted.sizes.rank)
    with (
        WorkProgress("extracting", "modules", simple=False) as progress,
        before.opened() as read_before,
        after.opened() as read_after,
    ):
        if any(pair.is_text for pair in pairs) and not text_encoders_differ(
            pairs, read_before, read_after, wanted.min_diff or 0.0
        ):
            logger.info("the text encoders differ by no more than --min_diff %g: left out", wanted.min_diff)
            pairs = [pair for pair in pairs if not pair.is_text]
        found = extract(
            pairs,
            read_before,
            read_after,
            wanted.sizes,
            device=wanted.device,
            save_dtype=wanted.save_dtype,
            titles=(before.path, after.path),
            progress=progress.update,
        )
    ranks = list(ranks_of(found.tensors))
    conv_rank = wanted.sizes.conv_rank
    args = {} if conv_rank is None else {"conv_dim": str(conv_rank), "conv_alpha": str(float(conv_rank))}
    metadata = adapter_metadata(
        record,
        family.network_module,
        ranks=ranks,
        alphas=ranks,
        title=wanted.target.stem,
        merged_from=None,
        modelspec=wanted.modelspec,
        network_args=json.dumps(args),
    )
    write_weights(wanted.target, found.tensors, None, metadata)
    logger.info("largest error of the ranks: %.3g of the change of %s", found.error, found.module)
    logger.info("saved: %s, %d modules", wanted.target, len(ranks))
