"""Convert Stable Diffusion 1.x, 2.x and XL between single files and diffusers folders.

    python tools/convert_diffusers20_original_sd.py --fp16 model_folder model.safetensors
    python tools/convert_diffusers20_original_sd.py model.safetensors model_folder --use_safetensors \\
        --reference_model other_folder
    python tools/convert_diffusers20_original_sd.py model.ckpt model.safetensors

The source is a single file (.safetensors, .ckpt), a diffusers folder or a Hub id; the target is a single file if its
name has an ending, else a folder. The kind of model is recognized from its tensors; --v1 and --v2 are checked. Tensors
keep their dtype unless a precision is given. A folder needs a tokenizer and a scheduler:
--reference_model names a folder or a Hub id to take them from; without it the tokenizer is the family's own, and the
scheduler its published one. More: docs/adapter_tools.md.
"""

from __future__ import annotations

import argparse
import ast
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--v1", action="store_true", help="the source is Stable Diffusion 1.x; where given, it is checked")
    add("--v2", action="store_true", help="the source is Stable Diffusion 2.x; where given, it is checked")
    add(
        "--unet_use_linear_projection",
        action="store_true",
        help="taken for old command lines: the tensors tell it",
    )
    add("--fp16", action="store_true", help="save in fp16")
    add("--bf16", action="store_true", help="save in bf16")
    add("--float", action="store_true", help="save in float32")
    add("--save_precision_as", default="no", choices=["fp16", "bf16", "float"], help="the same, in one option")
    add("--epoch", type=int, default=0, metavar="N", help="added to the epoch that a .ckpt records")
    add("--global_step", type=int, default=0, metavar="N", help="added to the steps that a .ckpt records")
    add("--metadata", metavar="DICT", help="of a .safetensors file: {'key': 'value', ...}")
    add("--variant", metavar="NAME", help="which weights of a folder or Hub id to read, such as fp16")
    add("--reference_model", metavar="MODEL", help="folder or Hub id whose tokenizer and scheduler a folder gets")
    add("--use_safetensors", action="store_true", help="write .safetensors files into a folder instead of .bin")
    add("model_to_load", metavar="SOURCE", help="file, diffusers folder or Hub id")
    add("model_to_save", metavar="TARGET", help="file to write, or folder where the name has no ending")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then convert.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    if args.v1 and args.v2:
        raise UserError("--v1 and --v2 exclude each other: the source is one of them")
    metadata = _metadata(args.metadata)
    # only now, as torch takes seconds to load
    from networks.files.convert_model import Conversion, convert_model

    convert_model(
        Conversion(
            source=args.model_to_load,
            target=Path(args.model_to_save),
            dtype=_dtype(args),
            metadata=metadata,
            counters={"epoch": args.epoch, "global_step": args.global_step},
            expected="sd" if args.v1 else "sd2" if args.v2 else None,
            variant=args.variant,
            reference=args.reference_model,
            safetensors=args.use_safetensors,
        )
    )


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype to save in; None keeps each tensor's own. The first that is given wins, as published."""
    from library.files.precisions import COMPUTE, parse_precision

    given = next((name for name in ("fp16", "bf16", "float") if getattr(args, name)), args.save_precision_as)
    return None if given == "no" else parse_precision("--save_precision_as", given, COMPUTE)


def _metadata(text: str | None) -> dict[str, str]:
    """``--metadata``: a dict in Python's or JSON's words; nothing in it is executed."""
    if text is None:
        return {}
    try:
        found: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--metadata {text}: must be a dict such as {{'key': 'value'}}")
    return {str(key): str(value) for key, value in found.items()}


if __name__ == "__main__":
    main(setup_parser().parse_args())
