"""Show, compare, merge, resize, extract and convert adapter files of every family.

    python tools/lora.py show --metadata lora.safetensors
    python tools/lora.py show a.safetensors b.safetensors
    python tools/lora.py diff a.safetensors b.safetensors --plot difference.png
    python tools/lora.py merge a.safetensors b.safetensors --ratios 0.7 0.5 --save_to both.safetensors
    python tools/lora.py merge a.safetensors --into model.safetensors --save_to merged.safetensors --precision fp16
    python tools/lora.py resize a.safetensors --rank 16 --save_to small.safetensors
    python tools/lora.py extract base.safetensors tuned.safetensors --rank 32 --save_to difference.safetensors
    python tools/lora.py convert a.safetensors --to diffusers --save_to a_diffusers.safetensors

Each command has its own --help. More: docs/adapter_tools.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error
from networks.files.options import PRECISIONS, checked_ratios


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_show, _add_diff, _add_merge, _add_resize, _add_extract, _add_convert):
        add(commands)
    return parser


Commands = Any  # argparse has no public name for the result of add_subparsers


def _add_show(commands: Commands) -> None:
    show = commands.add_parser("show", help="what files contain", description="Show what adapter files contain.")
    show.add_argument("files", nargs="+", metavar="FILE")
    show.add_argument("--metadata", action="store_true", help="all metadata, as JSON")
    show.set_defaults(run=_show)


def _add_diff(commands: Commands) -> None:
    diff = commands.add_parser(
        "diff",
        help="compare two files layer by layer",
        description="Compare the changes that two files make, layer by layer: norms, distance and cosine.",
    )
    diff.add_argument("files", nargs=2, metavar="FILE")
    diff.add_argument("--model", metavar="FILE", help="the model, for DoRA and OFT, whose change depends on it")
    diff.add_argument("--rows", type=int, default=30, metavar="N", help="layers in the table (30)")
    diff.add_argument("--csv", metavar="FILE", help="write all layers as a table")
    diff.add_argument("--plot", metavar="FILE", help="draw them as a .png")
    diff.add_argument("--overwrite", action="store_true", help="write over files that exist")
    diff.set_defaults(run=_diff)


def _add_merge(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="into a model, or with each other",
        description="Merge files into a model of any family, or with each other.",
    )
    merge.add_argument("files", nargs="+", metavar="FILE")
    merge.add_argument("--ratios", nargs="*", type=float, metavar="X", help="the strength of each file (default 1.0)")
    merge.add_argument("--into", metavar="MODEL", help="model to merge into, in one file")
    merge.add_argument(
        "--rank", type=int, metavar="N", help="with each other: the rank (default: the largest of the files)"
    )
    merge.add_argument("--concat", action="store_true", help="with each other: put the ranks side by side, exact")
    merge.add_argument(
        "--lbws",
        nargs="*",
        metavar="LIST",
        help="a list for each file: factors of the strength for each block of a U-Net",
    )
    _add_target(merge)
    merge.add_argument(
        "--precision", choices=PRECISIONS, help="dtype of the saved weights (default: the model's own, or float)"
    )
    merge.add_argument("--device", default="cpu", metavar="DEVICE", help="where to compute")
    merge.set_defaults(run=_merge)


def _add_resize(commands: Commands) -> None:
    resize = commands.add_parser(
        "resize", help="change the rank", description="Change the rank of a LoRA, like networks/resize_lora.py."
    )
    resize.add_argument("file", metavar="FILE")
    resize.add_argument("--rank", type=int, required=True, metavar="N", help="the new rank, or the largest one")
    resize.add_argument("--conv_rank", type=int, metavar="N", help="the rank of convolutions")
    resize.add_argument(
        "--method", choices=["sv_ratio", "sv_fro", "sv_cumulative"], help="how to choose the rank of each module"
    )
    resize.add_argument("--parameter", type=float, metavar="X", help="the parameter of the method")
    _add_target(resize)
    resize.add_argument("--precision", choices=PRECISIONS, help="dtype of the saved weights (default float)")
    resize.add_argument("--device", metavar="DEVICE", help="where to compute")
    resize.set_defaults(run=_resize)


def _add_extract(commands: Commands) -> None:
    extract = commands.add_parser(
        "extract", help="a LoRA from two models", description="Extract a LoRA from two models of any family."
    )
    extract.add_argument("before", metavar="MODEL")
    extract.add_argument("after", metavar="MODEL")
    extract.add_argument("--rank", type=int, required=True, metavar="N")
    extract.add_argument("--conv_rank", type=int, metavar="N", help="include convolutions, with this rank")
    extract.add_argument(
        "--min_diff", type=float, default=0.01, metavar="X", help="leave out text encoders that differ by no more"
    )
    _add_target(extract)
    extract.add_argument("--precision", default="float", choices=PRECISIONS, help="dtype of the saved weights")
    extract.add_argument("--device", default="cpu", metavar="DEVICE", help="where to compute")
    extract.set_defaults(run=_extract)


def _add_convert(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="other programs' names",
        description="Write a file with another program's names, like networks/convert_lora.py.",
    )
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--to", required=True, choices=["kohya", "diffusers", "peft", "comfyui"])
    convert.add_argument("--family", help="the family of the file, if its names fit several")
    _add_target(convert)
    convert.add_argument(
        "--precision", choices=PRECISIONS, help="dtype of the saved weights (default: each tensor's own)"
    )
    convert.set_defaults(run=_convert)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save_to", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="write over a file that exists")


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Run a command and return the exit code.

    Raises:
        SystemExit: with code 2, after clear lines.
    """
    setup_console(ConsoleOptions())
    for flag in ("save_to", "csv", "plot"):
        target = getattr(args, flag, None)
        if target and Path(target).is_file() and not args.overwrite:
            raise UserError(f"--{flag} {target}: exists already; give another name, or --overwrite")
    return args.run(args) or 0


# ---- the commands; torch is loaded only now ----


def _show(args: argparse.Namespace) -> None:
    import json

    from networks.files.merging import metadata_of
    from networks.files.summary import summary

    for path in map(Path, args.files):
        print("\n".join(summary(path)))
        if args.metadata:
            print(json.dumps(metadata_of(path), indent=4, sort_keys=True))


def _diff(args: argparse.Namespace) -> None:
    from library.files.streamed import check_target
    from networks.files.difference import compare, plot, table, write_csv
    from networks.files.extract import weight_at
    from networks.files.merging import open_files
    from networks.files.model_file import family_of, open_model

    sources = [Path(path) for path in [*args.files, *([args.model] if args.model else [])]]
    for flag, suffix in (("csv", ".csv"), ("plot", ".png")):
        if path := getattr(args, flag):
            check_target(Path(path), f"--{flag}", sources=sources, suffixes=(suffix,))
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: must be at least 1")
    if args.model:
        model = open_model(Path(args.model))
        family = family_of(model)
        places = {name: place for part in family.parts for name, place in part.places(model.shapes).items()}
        one, other = open_files(args.files, [1.0, 1.0], family)
        with model.opened() as read:
            layers = compare(one, other, lambda name: weight_at(read, places[name]).reshape(places[name].shape).float())
    else:
        one, other = open_files(args.files, [1.0, 1.0], None)
        layers = compare(one, other)
    print("\n".join(table(layers, args.rows)))
    if args.csv:
        write_csv(Path(args.csv), layers)
    if args.plot:
        plot(Path(args.plot), layers, (Path(args.files[0]).stem, Path(args.files[1]).stem))


def _merge(args: argparse.Namespace) -> None:
    import torch

    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, parse_precision
    from library.files.streamed import check_target
    from networks.files import merging
    from networks.files.block_weights import read_block_weights
    from networks.files.model_file import family_of, open_model
    from networks.files.svd import fixed

    ratios, target = checked_ratios(args.files, args.ratios), Path(args.save_to)
    blocks = read_block_weights(args.lbws, len(args.files))
    sources = [Path(path) for path in [*args.files, *([args.into] if args.into else [])]]
    check_target(target, "--save_to", sources=sources)
    dtype = parse_precision("--precision", args.precision, COMPUTE) if args.precision else None
    device = parse_device("--device", args.device)
    if not args.into:
        if args.rank is not None and (args.rank < 1 or args.concat):
            raise UserError(f"--rank {args.rank}: at least 1, and not with --concat, whose rank is the sum")
        computing = merging.Computing(torch.float32, dtype or torch.float32, working_device=device)
        rank_of = None if args.rank is None else fixed(args.rank)
        files = merging.open_files(args.files, ratios, None, blocks)
        merging.merge_files(files, target, computing, modelspec=True, concat=args.concat, rank_of=rank_of)
        return
    if args.rank is not None or args.concat:
        raise UserError("--rank and --concat are for files merged with each other; leave them out with --into")
    model = open_model(Path(args.into))
    family = family_of(model)
    files = merging.open_files(args.files, ratios, family, blocks)
    changes = merging.check_model(model, family.parts, files)
    record = family.record_of_model(model.shapes)
    metadata = merging.model_record_metadata(record, target, Path(args.into), files)
    computing = merging.Computing(torch.float32, dtype, working_device=device)
    merging.merge_into_model(model, changes, target, computing, flag="--save_to", title=family.title, metadata=metadata)


def _check_ranks(args: argparse.Namespace) -> None:
    """Raise UserError, with the flags of this program, for ranks that are impossible."""
    for flag, rank in (("--rank", args.rank), ("--conv_rank", args.conv_rank)):
        if rank is not None and rank < 1:
            raise UserError(f"{flag} {rank}: the rank is at least 1")


def _resize(args: argparse.Namespace) -> None:
    from networks import resize_lora

    _check_ranks(args)
    if (args.method is None) != (args.parameter is None):
        raise UserError("--method and --parameter go together: give both, or none")
    words = ["--model", args.file, "--save_to", args.save_to, "--new_rank", str(args.rank)]
    words += _given(
        ("--new_conv_rank", args.conv_rank),
        ("--dynamic_method", args.method),
        ("--dynamic_param", args.parameter),
        ("--save_precision", args.precision),
        ("--device", args.device),
    )
    resize_lora.main(resize_lora.setup_parser().parse_args(words))


def _extract(args: argparse.Namespace) -> None:
    from library.config.devices import parse_device
    from library.files.precisions import COMPUTE, parse_precision
    from networks.files.extracting import Extraction, check_sizes, open_pair, run_extraction

    _check_ranks(args)
    wanted = Extraction(
        before=Path(args.before),
        after=Path(args.after),
        target=Path(args.save_to),
        sizes=check_sizes(args.rank, args.conv_rank, 1.0),
        device=parse_device("--device", args.device),
        save_dtype=parse_precision("--precision", args.precision, COMPUTE),
        min_diff=args.min_diff,
        modelspec=True,
    )
    run_extraction(wanted, *open_pair(wanted))


def _convert(args: argparse.Namespace) -> int:
    from networks import convert_lora

    words = ["--model", args.file, "--save_to", args.save_to, "--to", args.to]
    words += _given(("--family", args.family), ("--save_precision", args.precision))
    return convert_lora.main(convert_lora.setup_parser().parse_args(words))


def _given(*options: tuple[str, object]) -> Sequence[str]:
    """Return the command-line words of the options that have a value."""
    return [word for flag, value in options if value is not None for word in (flag, str(value))]


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
