"""Change the rank of a LoRA file: the nearest LoRA of the new rank, module by module.

    python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 16
    python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 32 \\
        --dynamic_method sv_fro --dynamic_param 0.95 --save_precision bf16 --verbose

Without a method every module gets --new_rank (no more than it has). With one each module gets the ranks that it
needs, up to --new_rank: sv_ratio, singular values above the first over --dynamic_param; sv_cumulative, until their
sum is that share of all; sv_fro, until their norm is. The strength alpha / rank stays as it is, and so do names and
other tensors. The decomposition is that of the halves, not of the weight: a LoRA of SDXL takes a minute.
docs/adapter_tools.md says more.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from networks.files.options import PRECISIONS, required

if TYPE_CHECKING:
    from networks.files.resize import Module

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--save_precision", choices=[None, *PRECISIONS], help="dtype of the saved weights (default float)")
    add("--new_rank", type=int, default=4, metavar="N", help="the new rank; with a method, the largest (default 4)")
    add("--new_conv_rank", type=int, metavar="N", help="the same for convolutions (default: as --new_rank)")
    add("--save_to", metavar="FILE", help="file to write")
    add("--model", metavar="FILE", help="LoRA file to resize")
    add("--device", metavar="DEVICE", help="where to compute, such as cuda (default: the CPU)")
    add("--verbose", action="store_true", help="show what each module keeps")
    add(
        "--dynamic_method",
        choices=[None, "sv_ratio", "sv_fro", "sv_cumulative"],
        help="how to choose the rank of each module",
    )
    add("--dynamic_param", type=float, metavar="X", help="the parameter of the method, such as 10 or 0.95")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then resize.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    source = required("model", args.model, "name the LoRA file")
    target = required("save_to", args.save_to, "say where to save the result")
    for flag in ("new_rank", "new_conv_rank"):
        if (rank := getattr(args, flag)) is not None and rank < 1:
            raise UserError(f"--{flag} {rank}: the rank is at least 1")
    if (args.dynamic_method is None) != (args.dynamic_param is None):
        raise UserError("--dynamic_method and --dynamic_param go together: give both, or none")
    # only now, as torch takes seconds to load
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, parse_precision
    from library.files.safetensors_io import PICKLE_SUFFIXES, is_pickle, read_header
    from library.files.streamed import check_target
    from networks.files.resize import resize
    from networks.files.svd import dynamic, fixed
    from networks.weights import read_weights, write_weights

    check_target(target, "--save_to", sources=[source], suffixes=(".safetensors", *PICKLE_SUFFIXES))
    dtype = parse_precision("--save_precision", args.save_precision or "float", COMPUTE)
    device = parse_device("--device", args.device or "cpu")
    ranks = (args.new_rank, args.new_conv_rank or args.new_rank)
    if args.dynamic_method:
        chosen = [dynamic(args.dynamic_method, args.dynamic_param, rank) for rank in ranks]
    else:
        chosen = [fixed(rank) for rank in ranks]
    weights = read_weights(source)
    metadata = {} if is_pickle(source) else dict(read_header(source).metadata)
    resized, modules = resize(weights, str(source), *chosen, device=device, dtype=dtype)
    if args.verbose:
        print("\n".join(module.line() for module in modules))
    _say(modules)
    write_weights(target, resized, None, _metadata(metadata, modules, args))
    logger.info("saved: %s", target)


def _say(modules: Sequence[Module]) -> None:
    kept = [module.norm_kept for module in modules]
    ranks = sorted({module.new_rank for module in modules})
    logger.info(
        "%d modules, rank %s: %.1f%% of the norm kept on average (standard deviation %.1f%%), %.1f%% at least",
        len(modules),
        ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        *(100 * statistics.fmean(kept), 100 * statistics.pstdev(kept), 100 * min(kept)),
    )


def _metadata(metadata: Mapping[str, str], modules: Sequence[Module], args: argparse.Namespace) -> dict[str, str]:
    """Return the metadata of the source, with the new ranks."""
    from networks.files.records import text_of

    old = max(module.old_rank for module in modules)
    convs = [module for module in modules if module.is_conv]
    if args.dynamic_method:
        said = f"Dynamic resize with {args.dynamic_method}: {args.dynamic_param} from {old}; "
    else:
        conv = f" (conv: {args.new_conv_rank})" if args.new_conv_rank else ""
        said = f"dimension is resized from {old} to {args.new_rank}{conv}; "
    linear = [module for module in modules if not module.is_conv] or modules
    entries = {
        **metadata,
        "ss_training_comment": said + metadata.get("ss_training_comment", ""),
        "ss_network_dim": text_of(module.new_rank for module in linear),
        "ss_network_alpha": text_of(module.alpha for module in linear),
    }
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        arguments = {}
    if convs and isinstance(arguments, dict) and "conv_dim" in arguments:
        arguments |= {
            "conv_dim": text_of(module.new_rank for module in convs),
            "conv_alpha": text_of(module.alpha for module in convs),
        }
        entries["ss_network_args"] = json.dumps(arguments)
    return entries


if __name__ == "__main__":
    main(setup_parser().parse_args())
