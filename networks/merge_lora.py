"""Merge LoRA files into a Stable Diffusion 1.x or 2.x checkpoint, or with each other.

    python networks/merge_lora.py --sd_model model.safetensors --save_to merged.safetensors \\
        --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_precision fp16
    python networks/merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.5 --save_to both.safetensors
    python networks/merge_lora.py --models a.safetensors b.safetensors --concat --save_to both_exact.safetensors

With a checkpoint each weight becomes W + sum of ratio * change; LoRA, DoRA, LoHa, LoKr, OFT and whole differences are
merged by the change that they make, so that a ratio of 0.5 is half of the effect. The checkpoint is read and written
tensor by tensor, and everything else in it stays.

Without one the files are merged with each other. --concat puts the ranks side by side, which is exactly the sum;
without it the result is the LoRA nearest to the sum, of the largest rank that a file has, and a line says how near.
Ranks and alphas of the files may differ. docs/adapter_tools.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import exits_on_user_error
from networks.files.options import add_merge_options

FAMILIES = ("sd", "sd2")


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--v2", action="store_true", help="accepted for old command lines, without effect: the files tell"
    )
    parser.add_argument(
        "--sd_model", metavar="FILE", help="checkpoint to merge into; without it, the files are merged with each other"
    )
    parser.add_argument("--save_to", metavar="FILE", help="the .safetensors file to write")
    add_merge_options(parser)
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then merge.

    Raises:
        SystemExit: with code 2, after clear lines.
    """
    from networks.files.merge_script import run  # only now, as torch takes seconds to load

    run(args, FAMILIES, concat=args.concat, modelspec=not args.no_metadata)


if __name__ == "__main__":
    main(setup_parser().parse_args())
