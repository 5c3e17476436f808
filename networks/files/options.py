"""Options that several scripts for adapter files share, and their checks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from library.errors import UserError

PRECISIONS = ["float", "fp16", "bf16"]


def add_merge_options(parser: argparse.ArgumentParser, *, concat: bool = True, metadata: bool = True) -> None:
    """Add ``--models``, ``--ratios``, ``--precision``, ``--save_precision``, ``--no_metadata``, and ``--concat``."""
    add = parser.add_argument
    add("--models", nargs="*", metavar="FILE", help="the adapter files")
    add(
        "--ratios",
        nargs="*",
        type=float,
        metavar="X",
        help="the strength of each file, in the same order (default 1.0)",
    )
    add("--precision", default="float", choices=PRECISIONS, help="dtype to compute in (default float)")
    add(
        "--save_precision",
        choices=[None, *PRECISIONS],
        metavar="TYPE",
        help="dtype of the saved weights: float, fp16 or bf16 (default: as --precision)",
    )
    if metadata:
        add(
            "--no_metadata",
            action="store_true",
            help="write no modelspec.* entries; a LoRA keeps the metadata that loaders need",
        )
    if concat:
        add(
            "--concat",
            action="store_true",
            help="merge LoRA files with each other exactly: put their ranks side by side",
        )
        add(
            "--shuffle",
            action="store_true",
            help="accepted for old command lines, without effect: the order of the ranks does not change their sum",
        )


def checked_ratios(models: Sequence[str] | None, ratios: Sequence[float] | None) -> list[float]:
    """Return one strength for each file.

    Raises:
        UserError: no files, another number of strengths, or one that is not finite.
    """
    if not models:
        raise UserError("--models: name at least one LoRA file")
    ratios = list(ratios or [1.0] * len(models))
    if len(ratios) != len(models):
        raise UserError(f"--ratios: {len(ratios)} numbers for {len(models)} files; give one for each")
    if not all(map(math.isfinite, ratios)):
        raise UserError(f"--ratios {' '.join(map(str, ratios))}: must be finite numbers")
    return ratios


def required(flag: str, value: str | None, what: str) -> Path:
    """Return an option's value. Raises UserError if it is missing."""
    if not value:
        raise UserError(f"--{flag}: {what}")
    return Path(value)
