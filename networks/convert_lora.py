"""Convert an adapter file between kohya's (published), diffusers', PEFT's and ComfyUI's names.

    python networks/convert_lora.py --model lora.safetensors --save_to lora_diffusers.safetensors --to diffusers
    python networks/convert_lora.py --model pytorch_lora_weights.safetensors --save_to lora.safetensors --to kohya
    python networks/convert_lora.py --model lora.safetensors --save_to adapters --to peft

The family (Stable Diffusion 1.x, 2.x, XL, FLUX.1, Chroma) and the names are recognized from the file. The written file
is read again, and its weight deltas are compared with the source's, before it appears; the largest difference is
printed. docs/adapters.md explains each naming and what happens to alpha.

Exit codes: 0 converted, 1 the file already has these names, 2 it cannot be converted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.architectures.registry import abouts
from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="adapter to convert: a file, or a folder that PEFT wrote"
    )
    parser.add_argument("--save_to", type=Path, required=True, help=".safetensors file to write; for peft a new folder")
    parser.add_argument(
        "--to", required=True, choices=["kohya", "diffusers", "peft", "comfyui"], help="program whose names to write"
    )
    parser.add_argument(
        "--save_precision",
        choices=["float", "fp16", "bf16"],
        help="dtype of all tensors (default: each tensor's own)",
    )
    parser.add_argument(
        "--family",
        choices=[key for about in abouts() for key in about.adapter_keys],
        help="what the adapter was made for (default: recognized from the file)",
    )
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Convert, print what was done, and return the exit code."""
    # only now, as torch takes seconds to load
    from library.files.precisions import COMPUTE, parse_precision
    from networks.files.convert import AlreadyConverted, convert

    dtype = parse_precision("--save_precision", args.save_precision, COMPUTE) if args.save_precision else None
    try:
        report = convert(args.model, args.save_to, args.to, dtype=dtype, family=args.family)
    except AlreadyConverted as done:
        print(done, file=sys.stderr)
        return 1
    print("\n".join([*report.lines(), f"written: {args.save_to}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
