"""Convert FLUX.1 and Chroma adapters between the published names and AI-toolkit's, which are diffusers'.

    python networks/convert_flux_lora.py --src sd-scripts --dst ai-toolkit \\
        --src_path lora.safetensors --dst_path lora_diffusers.safetensors

Files trained with split_qkv become smaller on the way to ai-toolkit, others grow on the way back. Adapters of the text
encoders are converted too. It is networks/convert_lora.py with the names given instead of recognized.

Exit codes: 0 converted, 1 --src and --dst are the same, 2 it cannot be converted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import UserError, did_you_mean, exits_on_user_error

#: published names of the two layouts -> those of convert_lora
NAMES: dict[str, Literal["diffusers", "kohya"]] = {"ai-toolkit": "diffusers", "sd-scripts": "kohya"}


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--src", type=str, default="ai-toolkit", help="names of the source: ai-toolkit or sd-scripts")
    parser.add_argument("--dst", type=str, default="sd-scripts", help="names to write: ai-toolkit or sd-scripts")
    parser.add_argument("--src_path", type=str, default=None, help="adapter to convert")
    parser.add_argument("--dst_path", type=str, default=None, help=".safetensors file to write")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Convert, print what was done, and return the exit code."""
    for flag in ("src", "dst"):
        name = getattr(args, flag)
        if name not in NAMES:
            raise UserError(f"--{flag} {name}: must be {' or '.join(NAMES)}{did_you_mean(name, NAMES)}")
        if not getattr(args, f"{flag}_path"):
            raise UserError(f"--{flag}_path is missing")
    if args.src == args.dst:
        print(f"--src and --dst are both {args.src}; nothing to do", file=sys.stderr)
        return 1
    # only now, as torch takes seconds to load
    from networks.files.convert import convert

    # Chroma's modules have FLUX.1's names
    report = convert(
        Path(args.src_path),
        Path(args.dst_path),
        NAMES[args.dst],
        expected=NAMES[args.src],
        family="flux",
        flag="--dst_path",
    )
    print("\n".join([*report.lines(), f"written: {args.dst_path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
