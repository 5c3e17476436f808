"""Merge LoRA files into FLUX.1 or Chroma, into CLIP-L and T5-XXL, or with each other.

    python networks/flux_merge_lora.py --flux_model flux1-dev.safetensors --save_to merged.safetensors \\
        --models a.safetensors b.safetensors --ratios 1.0 0.5 --save_precision bf16 --mem_eff_load_save
    python networks/flux_merge_lora.py --clip_l clip_l.safetensors --clip_l_save_to merged_clip_l.safetensors \\
        --t5xxl t5xxl_fp16.safetensors --t5xxl_save_to merged_t5xxl.safetensors --models a.safetensors
    python networks/flux_merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.5 --concat \\
        --save_to both.safetensors

With a model: each weight becomes W + sum of ratio * change. Models are read and written tensor by tensor, so that
besides the LoRA files, about one tensor is in memory. All models may be merged in one command or each in its own;
what a LoRA has for a model that is not given is left out, with a line that says so.

Without a model the LoRA files are merged with each other. --concat gives the exact sum (its rank is the sum of the
ranks); without it the result is the nearest LoRA of the largest rank among the files, and a line says how near.

LoRA files may have the published names, diffusers' (also PEFT, AI-toolkit, OneTrainer) or ComfyUI's; DoRA, LoHa,
LoKr, OFT and whole differences (diff, diff_b) are merged into models, too. docs/flux_tools.md says more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import add_mapped_option, tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    from networks.files.lora_file import LoraFile
    from networks.files.merging import Computing

logger = logging.getLogger(__name__)

FAMILY = "flux_or_chroma"
#: option of a model -> option of where it is saved, in the order of the family's parts
_TARGETS = {"flux_model": "save_to", "clip_l": "clip_l_save_to", "t5xxl": "t5xxl_save_to"}


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="*", metavar="FILE", help="the LoRA files")
    add(
        "--ratios", nargs="*", type=float, metavar="X", help="the strength of each, in the same order; 1.0 if not given"
    )
    add(
        "--flux_model", metavar="FILE", help="FLUX.1 or Chroma transformer: single file, or a diffusers folder or shard"
    )
    add("--clip_l", metavar="FILE", help="CLIP-L to merge into")
    add("--t5xxl", metavar="FILE", help="T5-XXL to merge into")
    add("--save_to", metavar="FILE", help="the merged transformer, or without --flux_model the merged LoRA")
    add("--clip_l_save_to", metavar="FILE", help="the merged CLIP-L")
    add("--t5xxl_save_to", metavar="FILE", help="the merged T5-XXL")
    add(
        "--precision",
        default="float",
        metavar="TYPE",
        help="precision of the computation: float (default), fp16 or bf16",
    )
    add(
        "--save_precision",
        metavar="TYPE",
        help="precision of the files: float, fp16, bf16, for models also fp8 (e4m3fn, without scales) and fp8_e5m2; "
        "as --precision if not given, which for float makes FLUX.1 a file of 48 GB",
    )
    add_mapped_option(parser, "--mem_eff_load_save")
    add("--loading_device", default="cpu", metavar="DEVICE", help="device that a model's tensors are loaded to")
    add("--working_device", default="cpu", metavar="DEVICE", help="device of the computation, such as cuda")
    add("--concat", action="store_true", help="LoRA with LoRA: put the ranks side by side, the exact sum")
    add("--shuffle", action="store_true", help="taken for old command lines; the sum does not depend on ranks' order")
    add("--diffusers", action="store_true", help="refuse LoRA files without diffusers' names, which are found anyway")
    add("--no_metadata", action="store_true", help="write no modelspec.* entries; a LoRA keeps those loaders need")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check everything first, then merge.

    Raises:
        SystemExit: with code 2, after clear lines.
    """
    setup_console(ConsoleOptions())
    # only now, as torch takes seconds to load
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, SAVED, parse_precision
    from networks.files.families import family_named
    from networks.files.merging import Computing, merge_files, open_files
    from networks.files.options import checked_ratios

    ratios = checked_ratios(args.models, args.ratios)
    given = _check_targets(args)
    precision = parse_precision("--precision", args.precision, COMPUTE)
    known = SAVED if given else COMPUTE
    save_dtype = parse_precision("--save_precision", args.save_precision, known) if args.save_precision else precision
    devices = {name: parse_device(f"--{name}", getattr(args, name)) for name in ("loading_device", "working_device")}
    computing = Computing(precision, save_dtype, **devices)
    files = open_files(args.models, ratios, family_named(FAMILY))
    for file in files:
        if args.diffusers and not file.is_diffusers:
            raise UserError(f"--diffusers {file.path}: has the published names, not diffusers'; leave the option out")
    if given:
        _merge_into_models(args, given, files, computing)
    else:
        merge_files(files, Path(args.save_to), computing, modelspec=not args.no_metadata, concat=args.concat)


def _check_targets(args: argparse.Namespace) -> list[str]:
    """The options of the models that are given."""
    from library.files.streamed import check_target

    given = [name for name in _TARGETS if getattr(args, name)]
    sources = [Path(path) for path in [*args.models, *(getattr(args, name) for name in given)]]
    targets: set[Path] = set()
    for model, flag in _TARGETS.items():
        path = getattr(args, flag)
        merges_files = flag == "save_to" and not given
        if not path:
            if model in given or merges_files:
                raise UserError(f"--{flag}: say where to save the merged {'LoRA' if merges_files else model}")
            continue
        if model not in given and not merges_files:
            raise UserError(f"--{flag} {path}: there is no --{model} to merge into")
        target = Path(path)
        check_target(target, f"--{flag}", sources=sources)
        if target.resolve() in targets:
            raise UserError(f"--{flag} {path}: two models are to be saved under this name")
        targets.add(target.resolve())
    if args.shuffle or (given and args.concat):
        logger.warning("--shuffle changes nothing, and --concat nothing where LoRA files are merged into a model")
    return given


def _merge_into_models(args: argparse.Namespace, given: list[str], files: list[LoraFile], computing: Computing) -> None:
    from networks.files.families import family_named
    from networks.files.merging import check_model, merge_into_model, model_record_metadata, say_what_is_left_out
    from networks.files.model_file import family_of, open_model

    family = family_named(FAMILY)
    parts = dict(zip(_TARGETS, family.parts, strict=True))
    say_what_is_left_out(files, family, [parts[name] for name in given])
    work = []
    for name in given:  # everything is checked before anything is written
        path = Path(getattr(args, name))
        model = open_model(path, mapped=args.mem_eff_load_save)
        if not parts[name].locate(model.shapes):
            raise UserError(f"--{name} {path}: not a {family.title} {parts[name].title}")
        work.append((name, model, check_model(model, [parts[name]], files)))
    for name, model, changes in work:
        target = Path(getattr(args, _TARGETS[name]))
        metadata = None
        if name == "flux_model" and not args.no_metadata:
            record = family_of(model).record_of_model(model.shapes)
            metadata = model_record_metadata(record, target, Path(args.flux_model), files)
        merge_into_model(
            model,
            changes,
            target,
            computing,
            flag=f"--{_TARGETS[name]}",
            title=parts[name].title,
            metadata=metadata,
        )


if __name__ == "__main__":
    main(setup_parser().parse_args())
