"""Extract a LoRA from the difference between two Stable Diffusion 1.x, 2.x or XL models.

    python networks/extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors \\
        --save_to difference.safetensors --dim 32 --device cuda --save_precision fp16
    python networks/extract_lora_from_models.py --sdxl --model_org sdxl.safetensors --model_tuned tuned.safetensors \\
        --save_to difference.safetensors --dim 64 --conv_dim 32

For every layer that a LoRA adapts, the change of its weight is replaced by the nearest one of rank --dim (singular
value decomposition); alpha is the rank. --conv_dim takes convolutions in too. Text encoders are left out where none
of their weights differs by more than --min_diff. Layers that only differ by rounding, as by saving a model in fp16,
bf16
or fp8, are recognised and left out. Models are single files or diffusers folders and are read tensor by tensor.

docs/adapter_tools.md says more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from networks.files.options import PRECISIONS

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--v2", action="store_true", help="check that the models are Stable Diffusion 2.x")
    add(
        "--v_parameterization",
        action="store_true",
        default=None,
        help="record v prediction in the metadata (default for Stable Diffusion 2.x)",
    )
    add("--sdxl", action="store_true", help="check that the models are Stable Diffusion XL")
    add(
        "--load_precision",
        choices=[None, *PRECISIONS],
        help="round both models to this dtype before comparing them",
    )
    add("--save_precision", choices=[None, *PRECISIONS], help="dtype of the saved weights (default float)")
    add("--model_org", required=True, metavar="FILE", help="the original model")
    add(
        "--model_tuned", required=True, metavar="FILE", help="the tuned model, which the original becomes with the LoRA"
    )
    add("--save_to", required=True, metavar="FILE", help="the LoRA to write")
    add("--dim", type=int, default=4, metavar="N", help="rank of the LoRA (default 4)")
    add("--conv_dim", type=int, metavar="N", help="rank of convolutions larger than 1x1 (default: leave them out)")
    add("--device", metavar="DEVICE", help="where to compute, such as cuda (default: the CPU)")
    add(
        "--clamp_quantile",
        type=float,
        default=0.99,
        metavar="Q",
        help="clamp a module's values to this quantile of them (default 0.99); 1 clamps none, which is nearest to the "
        "difference",
    )
    add(
        "--min_diff",
        type=float,
        default=0.01,
        metavar="X",
        help="leave out text encoders that differ by no more (default 0.01)",
    )
    add("--no_metadata", action="store_true", help="write no modelspec.* entries, only those that loaders need")
    for which in ("original", "tuned"):
        add(
            f"--load_{which}_model_to",
            metavar="DEVICE",
            help="accepted for old command lines, without effect: models are read tensor by tensor",
        )
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then extract.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    # only now, as torch takes seconds to load
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, parse_precision
    from networks.files.extracting import Extraction, check_sizes, open_pair, run_extraction
    from networks.files.model_file import family_of, rounded_to

    sizes = check_sizes(args.dim, args.conv_dim, args.clamp_quantile)
    if not args.min_diff >= 0:
        raise UserError(f"--min_diff {args.min_diff}: must be at least 0")
    wanted = Extraction(
        before=Path(args.model_org),
        after=Path(args.model_tuned),
        target=Path(args.save_to),
        sizes=sizes,
        device=parse_device("--device", args.device or "cpu"),
        save_dtype=parse_precision("--save_precision", args.save_precision or "float", COMPUTE),
        min_diff=args.min_diff,
        modelspec=not args.no_metadata,
    )
    before, after = open_pair(wanted)
    if args.load_precision:
        dtype = parse_precision("--load_precision", args.load_precision, COMPUTE)
        before, after = rounded_to(before, dtype), rounded_to(after, dtype)
    family = family_of(before)
    for flag, keys in (("v2", ("sd2", "sd")), ("sdxl", ("sdxl",))):
        if getattr(args, flag) and family.key not in keys:
            raise UserError(f"--{flag}: {args.model_org} is {family.title}; leave the option out")
    predicts_v = args.v_parameterization
    records = [r for r in family.records if predicts_v is None or (r.prediction_type == "v") == predicts_v]
    run_extraction(wanted, before, after, family=family, record=(records or list(family.records))[0])


if __name__ == "__main__":
    main(setup_parser().parse_args())
