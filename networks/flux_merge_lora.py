"""Merge LoRA files into FLUX.1 or Chroma, into CLIP-L and T5-XXL, or with each other.

    python networks/flux_merge_lora.py --flux_model flux1-dev.safetensors --save_to merged.safetensors \\
        --models a.safetensors b.safetensors --ratios 1.0 0.5 --save_precision bf16 --mem_eff_load_save
    python networks/flux_merge_lora.py --clip_l clip_l.safetensors --clip_l_save_to merged_clip_l.safetensors \\
        --t5xxl t5xxl_fp16.safetensors --t5xxl_save_to merged_t5xxl.safetensors --models a.safetensors
    python networks/flux_merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.5 --concat \\
        --save_to both.safetensors

With a model: each weight becomes W + sum of ratio * (alpha / rank) * up @ down. Models are read and written tensor by
tensor, so that only the LoRA files and about one tensor are in memory. All models may be merged in one command or
separately. Modules for a model that is not given are skipped, and a line says so.

Without a model the LoRA files are merged with each other. Give --concat for the exact sum (its rank is the sum of the
ranks); without it tensors are added, which keeps the rank, needs equal ranks and is not exact.

LoRA files may have the published names, diffusers' (also PEFT, AI-toolkit, OneTrainer) or ComfyUI's; DoRA and whole
differences (diff, diff_b) are merged into models, too. More: docs/flux_tools.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import add_mapped_option, tool_parser
from library.errors import UserError, exits_on_user_error

if TYPE_CHECKING:
    from networks.lora_merging import LoraFile

logger = logging.getLogger(__name__)

#: option of a model -> option of its output file
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
    add("--shuffle", action="store_true", help="LoRA with LoRA: add ranks in random order; nothing with --concat")
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
    given = _check_options(args)
    # only now, as torch takes seconds to load
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, SAVED, parse_precision
    from networks.lora_merging import LoraFile

    precision = parse_precision("--precision", args.precision, COMPUTE)
    known = SAVED if given else COMPUTE
    save_dtype = parse_precision("--save_precision", args.save_precision, known) if args.save_precision else precision
    devices = {name: parse_device(f"--{name}", getattr(args, name)) for name in ("loading_device", "working_device")}
    files = [LoraFile.open(Path(path), ratio) for path, ratio in zip(args.models, args.ratios, strict=True)]
    for file in files:
        logger.info("%s: %d modules, ratio %g", file.path, len(file.adapters), file.ratio)
        if args.diffusers and not file.is_diffusers:
            raise UserError(f"--diffusers {file.path}: has the published names, not diffusers'; leave the option out")
    if given:
        _merge_into_models(args, given, files, precision=precision, save_dtype=save_dtype, **devices)
    else:
        _merge_files(args, files, precision=precision, save_dtype=save_dtype, device=devices["working_device"])


def _check_options(args: argparse.Namespace) -> list[str]:
    """Return the options of the given models; fills in the ratios."""
    from library.files.streamed import check_target

    if not args.models:
        raise UserError("--models: name at least one LoRA file")
    args.ratios = args.ratios or [1.0] * len(args.models)
    if len(args.ratios) != len(args.models):
        raise UserError(f"--ratios: {len(args.ratios)} numbers for {len(args.models)} files of --models; one for each")
    given = [name for name in _TARGETS if getattr(args, name)]
    if not all(map(math.isfinite, args.ratios)):
        raise UserError(f"--ratios {' '.join(map(str, args.ratios))}: must be finite numbers")
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
    if given and (args.concat or args.shuffle):
        logger.warning("--concat and --shuffle change nothing when LoRA files are merged into a model")
    elif args.concat and args.shuffle:
        logger.warning("--shuffle changes nothing with --concat, where no ranks are added")
    return given


def _merge_into_models(
    args: argparse.Namespace, given: list[str], files: list[LoraFile], *, save_dtype: Any, **how: Any
) -> None:
    from dataclasses import replace

    from library.architectures.common.sharded_file import ShardedFile
    from library.architectures.flux.diffusers_layout import open_transformer, variant_of
    from library.architectures.flux.published_file import model_metadata
    from library.files.streamed import write_model
    from library.training.work_progress import WorkProgress
    from networks.lora_merging import find_changes, merging_reader
    from networks.model_keys import CLIP_L, T5XXL, TRANSFORMER

    parts = {"flux_model": TRANSFORMER, "clip_l": CLIP_L, "t5xxl": T5XXL}
    _say_what_is_left_out(files, [parts[name] for name in given])
    work = []
    for name in given:  # everything is checked before anything is written
        path = Path(getattr(args, name))
        source = open_transformer(path) if name == "flux_model" else ShardedFile.open(path)
        source = replace(source, mapped=args.mem_eff_load_save)
        work.append((name, source, find_changes(parts[name], source.shapes, files, path)))
    merged_from = ", ".join(Path(path).stem for path in [args.flux_model or "", *args.models] if path)
    for name, source, changes in work:
        target = Path(getattr(args, _TARGETS[name]))
        logger.info("%s: %d of %d tensors are changed", source.path, len(changes), len(source.shapes))
        metadata = None
        if name == "flux_model" and not args.no_metadata:
            metadata = model_metadata(variant_of(source).kind, title=target.stem, merged_from=merged_from)
        with WorkProgress(f"merging {parts[name].title}", "tensors", simple=False) as progress, source.opened() as read:
            write_model(
                target,
                source,
                merging_reader(read, changes, save_dtype=save_dtype, **how),
                flag=f"--{_TARGETS[name]}",
                dtype=save_dtype,
                metadata=metadata,
                progress=progress.update,
            )


def _say_what_is_left_out(files: list[LoraFile], parts: list[Any]) -> None:
    from networks.model_keys import PARTS

    for file in files:
        for part in PARTS:
            count = sum(adapter.part is part.part for adapter in file.adapters.values())
            if count and part not in parts:
                logger.info("%s: its %d modules of the %s are left out", file.path, count, part.title)


def _merge_files(
    args: argparse.Namespace, files: list[LoraFile], *, precision: Any, save_dtype: Any, device: Any
) -> None:
    from library.architectures.flux.published_file import adapter_metadata
    from networks.lora_merging import combine
    from networks.weights import sizes_of, write_weights

    if len(files) > 1 and not args.concat:
        logger.warning("tensors are added, which is not the sum of what the files change; --concat gives that exactly")
    merged = combine(
        files, concat=args.concat, shuffle=args.shuffle and not args.concat, dtype=precision, device=device
    )
    sizes = sizes_of(merged).values()
    ranks, alphas = {size.rank for size in sizes}, {size.alpha for size in sizes}
    target = Path(args.save_to)
    metadata = adapter_metadata(
        _made_for(files),
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=alphas.pop() if len(alphas) == 1 else None,
        title=target.stem,
        merged_from=", ".join(file.path.stem for file in files),
        modelspec=not args.no_metadata,
    )
    write_weights(target, merged, save_dtype, metadata)
    logger.info("saved: %s, %d modules", target, len(sizes))


def _made_for(files: list[LoraFile]) -> str:
    """Return the kind of model in the metadata of the first file that has it; FLUX.1 dev if none has."""
    from library.architectures.flux.names import CHROMA, DEV, SCHNELL

    versions = {file.metadata["ss_base_model_version"] for file in files if "ss_base_model_version" in file.metadata}
    if len(versions) > 1:
        logger.warning("the LoRA files were made for different models: %s", ", ".join(sorted(versions)))
    told = [file.metadata for file in files if file.metadata.get("modelspec.architecture")]
    architecture = told[0]["modelspec.architecture"] if told else ""
    if architecture.startswith("chroma") or (not told and versions == {"chroma"}):
        return CHROMA
    return SCHNELL if "schnell" in architecture else DEV


if __name__ == "__main__":
    main(setup_parser().parse_args())
