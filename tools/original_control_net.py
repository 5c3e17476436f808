"""Convert a ControlNet between the original names and diffusers', and make a whole one of a difference.

    python tools/original_control_net.py control.safetensors --model model.safetensors --save_to control_folder
    python tools/original_control_net.py control_folder --model model.safetensors --save_to original.safetensors \\
        --precision fp16

Files are of Stable Diffusion 1.x, 2.x or XL. Parts that a file lacks are those of --model, and differences are added to
it. A target without an ending becomes a folder in diffusers' form; a file gets the original names, or diffusers' with
--names diffusers. gen_img.py reads every form. More: docs/tools.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from networks.files.options import PRECISIONS


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="ControlNet: file, diffusers folder or Hub id")
    add("--model", required=True, metavar="MODEL", help="checkpoint, folder or Hub id of a model that it is for")
    add("--save_to", required=True, metavar="TARGET", help="file to write, or folder where the name has no ending")
    add("--names", choices=["original", "diffusers"], default="original", help="names in a file (original)")
    add("--precision", choices=PRECISIONS, help="dtype of the saved weights (default: each tensor's own)")
    add("--overwrite", action="store_true", help="write over a file that exists")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Convert.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    target = Path(args.save_to)
    if target.is_file() and not args.overwrite:
        raise UserError(f"--save_to {target}: exists already; give another name, or --overwrite")
    # only now, as torch takes seconds to load
    from library.files.precisions import COMPUTE, parse_precision
    from networks.files.convert_control import ControlConversion, convert_control

    dtype = parse_precision("--precision", args.precision, COMPUTE) if args.precision else None
    print("\n".join(convert_control(ControlConversion(args.source, args.model, target, args.names, dtype))))


if __name__ == "__main__":
    main(setup_parser().parse_args())
