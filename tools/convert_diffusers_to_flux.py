"""Convert a FLUX.1 or Chroma transformer from diffusers' layout into the published single file.

    python tools/convert_diffusers_to_flux.py --diffusers_path FLUX.1-dev --save_to flux1-dev.safetensors
    python tools/convert_diffusers_to_flux.py --save_precision bf16 --mem_eff_load_save \\
        --diffusers_path transformer/diffusion_pytorch_model-00001-of-00003.safetensors --save_to flux1.safetensors

FLUX.1 dev, FLUX.1 schnell and Chroma are recognized by their tensors. Values are the same bit for bit unless
--save_precision sets another dtype. The file is written tensor by tensor, so a few hundred megabytes of memory are
enough, and it appears under its name only when it is whole. Autoencoder, CLIP-L and T5-XXL are not converted: they are
read from their own files.

More: docs/flux_tools.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import add_mapped_option, tool_parser
from library.errors import exits_on_user_error

logger = logging.getLogger(__name__)


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--diffusers_path",
        required=True,
        metavar="PATH",
        help="the pipeline's folder (with transformer/ in it), the transformer folder, or the first of its "
        "...-00001-of-0000N.safetensors",
    )
    parser.add_argument("--save_to", required=True, metavar="FILE", help="the .safetensors file to write")
    add_mapped_option(parser, "--mem_eff_load_save")
    parser.add_argument(
        "--save_precision",
        metavar="TYPE",
        help="float, fp16, bf16, fp8 (e4m3fn, without scales) or fp8_e5m2; as in the source if not given",
    )
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then convert.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    # only now, as torch takes seconds to load
    from dataclasses import replace

    from library.architectures.flux.adapters import RECORDS
    from library.architectures.flux.diffusers_layout import open_diffusers_transformer, variant_of
    from library.config.work_progress import WorkProgress
    from library.files.precisions import SAVED, parse_precision
    from library.files.streamed import check_target, write_model
    from networks.files.records import model_metadata

    target = Path(args.save_to)
    check_target(target, "--save_to")
    dtype = parse_precision("--save_precision", args.save_precision, SAVED) if args.save_precision else None
    source = replace(open_diffusers_transformer(Path(args.diffusers_path)), mapped=args.mem_eff_load_save)
    variant = variant_of(source)
    logger.info("%s: %s, %d tensors in %d", source.path, variant.title, len(source.file.shapes), len(source.shapes))
    metadata = model_metadata(RECORDS[variant.kind], title=target.stem)
    with WorkProgress("converting", "tensors", simple=False) as progress, source.opened() as read:
        write_model(target, source, read, flag="--save_to", dtype=dtype, metadata=metadata, progress=progress.update)


if __name__ == "__main__":
    main(setup_parser().parse_args())
