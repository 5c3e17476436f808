"""Options that several scripts for adapter files have, and how they are checked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from library.errors import UserError

PRECISIONS = ["float", "fp16", "bf16"]


def add_merge_options(parser: argparse.ArgumentParser, *, concat: bool = True, metadata: bool = True) -> None:
    """``--models``, ``--ratios``, ``--precision``, ``--save_precision``, ``--no_metadata``, and ``--concat``."""
    add = parser.add_argument
    add("--models", nargs="*", metavar="FILE", help="the adapter files")
    add("--ratios", nargs="*", type=float, metavar="X", help="the strength of each, in the same order; 1.0 if left out")
    add("--precision", default="float", choices=PRECISIONS, help="to compute in (default float)")
    add(
        "--save_precision",
        choices=[None, *PRECISIONS],
        metavar="TYPE",
        help="of the saved numbers: float, fp16 or bf16; as --precision if not given",
    )
    if metadata:
        add("--no_metadata", action="store_true", help="write no modelspec.* entries; a LoRA keeps those loaders need")
    if concat:
        add("--concat", action="store_true", help="LoRA with LoRA: put the ranks side by side, which is the exact sum")
        add(
            "--shuffle",
            action="store_true",
            help="taken for old command lines: it put ranks in random order, which changes nothing about their sum",
        )


def checked_ratios(models: Sequence[str] | None, ratios: Sequence[float] | None) -> list[float]:
    """One strength for each file.

    Raises:
        UserError: no files, another number of strengths, or one that is not finite.
    """
    if not models:
        raise UserError("--models: name at least one LoRA file")
    ratios = list(ratios or [1.0] * len(models))
    if len(ratios) != len(models):
        raise UserError(f"--ratios: {len(ratios)} numbers for {len(models)} files of --models; one for each")
    if not all(map(math.isfinite, ratios)):
        raise UserError(f"--ratios {' '.join(map(str, ratios))}: must be finite numbers")
    return ratios


def required(flag: str, value: str | None, what: str) -> Path:
    """Raises UserError for an option that is missing."""
    if not value:
        raise UserError(f"--{flag}: {what}")
    return Path(value)


def existing(paths: Iterable[str | Path]) -> list[Path]:
    """Raises UserError for the first that is missing."""
    found = [Path(path) for path in paths]
    for path in found:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    return found
