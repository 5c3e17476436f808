"""The families' minimal inference scripts: command line, checks, and the images.

torch and the models are imported after the checks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from library.architectures.minimal_inference import ImageRequest, MinimalInference
from library.config.arguments import ConsoleOptions, build_parser
from library.config.console import setup_console
from library.config.help import split_doc
from library.config.prompt_options import MAX_SEED
from library.errors import UserError, exits_on_user_error
from library.inference.prompt_line import MAX_STEPS, check_size


def minimal_parser(doc: str | None, inference: MinimalInference) -> argparse.ArgumentParser:
    """Return the parser of a script.

    Args:
        doc: the script's docstring: what it does, an example command, where to read more.
    """
    summary, example, more = split_doc(doc)
    return build_parser(inference.groups, description=summary, epilog=example, more=more)


@exits_on_user_error
def generate_minimal(inference: MinimalInference, args: argparse.Namespace) -> list[Path]:
    """Generate the images of a script's command line; returns the files. Exits on mistakes."""
    return generate_with(inference, inference.options.from_args(args))


def generate_with(inference: MinimalInference, options: Any, lines: TextIO | None = None) -> list[Path]:
    """Check the options and generate the prompt of the command line, or with ``--interactive`` typed prompts.

    Args:
        options: of ``inference.options``.
        lines: source of typed prompts; default is the keyboard.

    Returns:
        the files, in the order they were written.

    Raises:
        UserError: mistakes in options; wrong or missing files. Errors of typed prompts are printed, and the next prompt
            is read.
    """
    check_options(inference, options)
    from library.inference.minimal import generate_for  # only now, as torch takes seconds to load

    setup_console(ConsoleOptions())
    return generate_for(inference, options, lines or sys.stdin)


def check_options(inference: MinimalInference, options: Any) -> None:
    """Refuse what cannot work, all findings at once, before torch is loaded.

    Raises:
        UserError: one line per finding.
    """
    findings = [*inference.findings(options), *_common_findings(inference, inference.request(options))]
    if findings:
        raise UserError("\n".join(findings))


def _common_findings(inference: MinimalInference, request: ImageRequest) -> Iterator[str]:
    """Yield what is wrong with sizes, steps, seeds, scales, folders and LoRA files, one line each."""

    def flag(name: str) -> str:
        return f"--{inference.flags.get(name, name)}"

    given = request.settings
    for name in ("width", "height"):
        try:
            check_size(given[name], flag(name), inference.size_step)
        except UserError as error:
            yield str(error)
    steps, scale = given.get("steps"), given["scale"]
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        yield f"{flag('steps')} {steps}: must be 1 to {MAX_STEPS}"
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        yield f"--seed {request.seed}: must be 0 to {MAX_SEED}"
    if not abs(scale) < float("inf"):
        yield f"{flag('scale')} {scale:g}: must be a finite number"
    if Path(request.output_dir).exists() and not Path(request.output_dir).is_dir():
        yield f"{flag('output_dir')} {request.output_dir}: is a file; give a folder"
    if request.merge_lora_weights and not request.lora_weights:
        yield f"--merge_lora_weights: there is nothing to merge; give {inference.lora_flag}"
