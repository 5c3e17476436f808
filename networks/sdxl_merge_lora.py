"""Merge LoRA files into a Stable Diffusion XL checkpoint, or with each other.

    python networks/sdxl_merge_lora.py --sd_model sdxl.safetensors --save_to merged.safetensors \\
        --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_precision fp16
    python networks/sdxl_merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.5 --save_to both.safetensors
    python networks/sdxl_merge_lora.py --sd_model sdxl.safetensors --save_to merged.safetensors \\
        --lbws "[1,1,1,1,1,0,1,1,1,0.5,0.5,0.5]"

Like networks/merge_lora.py, with --lbws: factors of the ratio for each block of the U-Net, one list for each file.
Lists of 12 and 20 numbers are for SDXL, of 17 and 26 for Stable Diffusion; the first number is for text encoders. OFT
files are merged into a model at their ratio. docs/adapter_tools.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error
from networks.files.block_weights import read_block_weights
from networks.files.options import add_merge_options, checked_ratios


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--sd_model", metavar="FILE", help="checkpoint to merge into; without it, the files are merged with each other"
    )
    parser.add_argument("--save_to", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "--lbws", nargs="*", metavar="LIST", help="a JSON list for each file: factors of the ratio for each block"
    )
    add_merge_options(parser)
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then merge.

    Raises:
        SystemExit: with code 2, after clear lines.
    """
    checked_ratios(args.models, args.ratios)
    blocks = read_block_weights(args.lbws, len(args.models))
    from networks.files.merge_script import run  # only now, as torch takes seconds to load

    run(args, ("sdxl",), blocks=blocks, concat=args.concat, modelspec=not args.no_metadata)


if __name__ == "__main__":
    main(setup_parser().parse_args())
