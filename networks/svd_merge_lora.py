"""Merge adapter files with each other into one LoRA of the rank that is asked for.

    python networks/svd_merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.5 --new_rank 32 \\
        --save_to both.safetensors --save_precision bf16
    python networks/svd_merge_lora.py --models lokr.safetensors --new_rank 64 --save_to as_lora.safetensors

The sum of ratio * change of all files is replaced, module by module, by the nearest one of --new_rank (singular value
decomposition). Ranks, alphas and kinds of the files may differ (LoRA, LoHa, LoKr, whole differences), of every family
that convert_lora.py knows. A rank that is large enough gives the sum exactly; a line says how much it leaves out.
--lbws gives factors of the ratio by block of a U-Net. docs/adapter_tools.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from networks.files.block_weights import read_block_weights
from networks.files.options import add_merge_options, checked_ratios, required


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--save_to", metavar="FILE", help="the .safetensors file to write")
    add("--lbws", nargs="*", metavar="LIST", help="a JSON list for each file: factors of the ratio for each block")
    add("--new_rank", type=int, default=4, metavar="N", help="rank of the result (default 4)")
    add("--new_conv_rank", type=int, metavar="N", help="rank of convolutions larger than 1x1 (default: as --new_rank)")
    add("--device", metavar="DEVICE", help="where to compute, such as cuda (default: the CPU)")
    add_merge_options(parser, concat=False)
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then merge.

    Raises:
        SystemExit: with code 2, after clear lines.
    """
    setup_console(ConsoleOptions())
    ratios = checked_ratios(args.models, args.ratios)
    blocks = read_block_weights(args.lbws, len(args.models))
    for flag in ("new_rank", "new_conv_rank"):
        if (rank := getattr(args, flag)) is not None and rank < 1:
            raise UserError(f"--{flag} {rank}: the rank is at least 1")
    target = required("save_to", args.save_to, "say where to save the result")
    # only now, as torch takes seconds to load
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, parse_precision
    from library.files.streamed import check_target
    from networks.files.merging import Computing, merge_files, open_files
    from networks.files.svd import fixed

    check_target(target, "--save_to", sources=map(Path, args.models))
    precision = parse_precision("--precision", args.precision, COMPUTE)
    save_dtype = parse_precision("--save_precision", args.save_precision, COMPUTE) if args.save_precision else precision
    computing = Computing(precision, save_dtype, working_device=parse_device("--device", args.device or "cpu"))
    conv_rank = args.new_conv_rank or args.new_rank
    merge_files(
        open_files(args.models, ratios, None, blocks),
        target,
        computing,
        modelspec=not args.no_metadata,
        rank_of=fixed(args.new_rank),
        conv_rank_of=fixed(conv_rank),
        network_args={"conv_dim": str(conv_rank), "conv_alpha": str(float(conv_rank))},
    )


if __name__ == "__main__":
    main(setup_parser().parse_args())
