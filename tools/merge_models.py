"""Blend models with each other: each tensor of the result is the weighted sum of theirs.

    python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output blend.safetensors \\
        --saving_precision fp16
    python tools/merge_models.py --models a.safetensors b.safetensors --unet_only --output blend.safetensors

Models are single files of one kind and size, of any family. Ratios are used as they are; without them each model
counts equally. The tensors are those of the first model: what another lacks is taken from the first, with a warning,
and what only others have is left out. Numbers that are no weights (position_ids) are the first model's. Files are
read and written tensor by tensor. More: docs/adapter_tools.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
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
    add("--models", nargs="+", metavar="FILE", help="the models, .safetensors")
    add("--output", metavar="FILE", help="the .safetensors file to write")
    add("--ratios", nargs="+", type=float, metavar="X", help="what each counts; 1 / their number if not given")
    add("--unet_only", action="store_true", help="blend U-Nets alone; everything else is the first model's")
    add("--device", default="cpu", metavar="DEVICE", help="where to compute, such as cuda")
    add("--precision", default="float", choices=PRECISIONS, help="to compute in (default float)")
    add("--saving_precision", default="float", choices=PRECISIONS, help="of the saved numbers (default float)")
    add("--show_skipped", action="store_true", help="list the tensors that are left out")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then blend.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    if not args.models:
        raise UserError("--models: name the models to blend")
    if not args.output:
        raise UserError("--output: say where to save the result")
    ratios = args.ratios or [1 / len(args.models)] * len(args.models)
    if len(ratios) != len(args.models):
        raise UserError(f"--ratios: {len(ratios)} numbers for {len(args.models)} models; one for each")
    if not all(map(math.isfinite, ratios)):
        raise UserError(f"--ratios {' '.join(map(str, ratios))}: must be finite numbers")
    # only now, as torch takes seconds to load
    from library.config.devices import parse_device
    from library.config.work_progress import WorkProgress
    from library.files.precisions import COMPUTE, parse_precision
    from library.files.streamed import check_target
    from networks.files.blend import Source, plan, write_blend
    from networks.files.families import family_of_model
    from networks.files.merging import metadata_of
    from networks.files.model_file import open_model
    from networks.files.records import merged_from, model_metadata

    target = Path(args.output if args.output.endswith(".safetensors") else f"{args.output}.safetensors")
    paths = [Path(path) for path in args.models]
    for path in paths:
        if path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"--models {path}: must be a .safetensors file")
    check_target(target, "--output", sources=paths)
    sources = [Source.of(open_model(path), ratio) for path, ratio in zip(paths, ratios, strict=True)]
    blend = plan(sources, unet_only=args.unet_only)
    for path, names in blend.missing:
        logger.warning(
            "%s: lacks %d tensors (%s, ...); those of %s stand for them", path, len(names), names[0], paths[0]
        )
    for path, names in blend.skipped:
        shown = "\n".join(("", *names)) if args.show_skipped else f" ({names[0]}, ...)"
        logger.info("%s: %d tensors are not in %s and are left out%s", path, len(names), paths[0], shown)
    family = family_of_model(sources[0].model.shapes)
    metadata: dict[str, str] = {}
    if family is not None:
        recorded = metadata_of(paths[0])
        record = family.record_of(recorded) if recorded else family.record_of_model(sources[0].model.shapes)
        merged = merged_from((path, metadata_of(path)) for path in paths)
        metadata = model_metadata(record, title=target.stem, merged_from=merged)
    with WorkProgress("blending", "tensors", simple=False) as progress:
        write_blend(
            target,
            blend,
            device=parse_device("--device", args.device),
            precision=parse_precision("--precision", args.precision, COMPUTE),
            save_dtype=parse_precision("--saving_precision", args.saving_precision, COMPUTE),
            metadata=metadata,
            progress=progress.update,
        )
    logger.info("saved: %s, %d tensors, %s", target, len(sources[0].own), ", ".join(f"{r:g}" for r in ratios))


if __name__ == "__main__":
    main(setup_parser().parse_args())
