"""Build the table before the first step, which ``--dry_run`` prints too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from library.data import describe
from library.training import precision
from library.training.checkpoints import ema_path
from library.training.kinds.base import Kind
from library.training.memory import frozen_dtype_text, memory_plan
from library.training.run import Run
from library.training.sharding import sharding_rows
from library.training.text_caching import text_cache_row
from library.training.zero import zero_rows


def summary(
    run: Run,
    kind: Kind,
    denoiser: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[tuple[str, str]]:
    """Return rows for people: model, data, training; a dry run has no optimizer."""
    options, plan = run.options, run.plan
    accumulated = plan.gradient_accumulation_steps
    batches = f"{plan.batches_per_epoch} batches an epoch" + (f", {accumulated} to a step" if accumulated > 1 else "")
    caches = "on disk" if options.dataset.cache_latents_to_disk else "in memory" if run.caches_latents else "no"
    return [
        ("model", f"{options.model.pretrained_model_name_or_path} ({run.checked.info.description})"),
        *describe.summary_rows(run.data),
        ("latents cached", caches),
        ("text encoder outputs cached", text_cache_row(options.dataset)),
        *kind.rows(sum(p.numel() for p in parameters)),
        *_average_rows(options.optimizer.ema_decay, run.names.final()),
        *zero_rows(optimizer, parameters, options.training),
        ("optimizer", f"{run.checked.optimizer.metadata_name}, schedule {options.scheduler.lr_scheduler}"),
        ("precision", precision.precision_row(options.training, frozen_dtype_text(memory_plan(run, kind)), run.device)),
        *sharding_rows(run.sharding, denoiser, run.accelerator.num_processes),
        ("steps", f"{plan.total_steps} in {plan.num_epochs} epochs, {batches}"),
        ("seed", str(run.checked.seed)),
        ("output", str(run.names.final())),
        ("logs", str(run.checked.trackers.directory)),
    ]


def _average_rows(decay: float | None, final: Path) -> list[tuple[str, str]]:
    if decay is None:
        return []
    return [("average", f"decay {decay:g}, saved as {ema_path(final).name}")]
