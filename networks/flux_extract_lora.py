"""Extract a LoRA from the difference between two FLUX.1 or Chroma models.

    python networks/flux_extract_lora.py --model_org flux1-dev.safetensors --model_tuned tuned.safetensors \\
        --save_to difference.safetensors --dim 32 --device cuda --save_precision bf16 --mem_eff_safe_open

For every linear layer of the blocks, the change of its weight is approximated with rank --dim, by singular value
decomposition; alpha is the rank. The file loads like one trained with networks.lora_flux. Both models are read tensor
by tensor, so that only the LoRA and a few tensors are in memory. Single files in the published layout and diffusers
folders are accepted. A GPU (--device cuda) is many times as fast as the CPU.

Text encoders and biases are not extracted. More: docs/flux_tools.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import add_mapped_option, tool_parser
from library.errors import UserError, exits_on_user_error


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--model_org", required=True, metavar="FILE", help="the model before")
    add("--model_tuned", required=True, metavar="FILE", help="the model after: the LoRA turns the first into it")
    add("--save_to", required=True, metavar="FILE", help="the LoRA to write")
    add("--dim", type=int, default=4, metavar="N", help="its rank (default 4)")
    add("--device", metavar="DEVICE", help="device of the computation, such as cuda; the CPU if not given")
    add(
        "--clamp_quantile",
        type=float,
        default=0.99,
        metavar="Q",
        help="cut numbers beyond plus or minus this quantile of a module's numbers (default 0.99); 1 cuts none, which "
        "is nearest to the difference",
    )
    add(
        "--save_precision",
        choices=[None, "float", "fp16", "bf16"],
        metavar="TYPE",
        help="precision of the saved file: float, fp16 or bf16; float if not given",
    )
    add_mapped_option(parser, "--mem_eff_safe_open")
    add("--no_metadata", action="store_true", help="write no modelspec.* entries, only those that loaders need")
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
    from networks.files.families import family_named

    sizes = check_sizes(args.dim, None, args.clamp_quantile)
    wanted = Extraction(
        before=Path(args.model_org),
        after=Path(args.model_tuned),
        target=Path(args.save_to),
        sizes=sizes,
        device=parse_device("--device", args.device or "cpu"),
        save_dtype=parse_precision("--save_precision", args.save_precision or "float", COMPUTE),
        min_diff=None,
        modelspec=not args.no_metadata,
        mapped=args.mem_eff_safe_open,
    )
    before, after = open_pair(wanted)
    family = family_named("flux_or_chroma")
    for model in (before, after):
        if not family.parts[0].locate(model.shapes):
            example = next(iter(model.shapes), "nothing")
            raise UserError(f"{model.path}: not a {family.title} transformer (it holds {example}, ...)")
    run_extraction(wanted, before, after, family=family)


if __name__ == "__main__":
    main(setup_parser().parse_args())
