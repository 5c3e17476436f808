"""Put the parts of a Stable Diffusion 3 or 3.5 model into one file, which other programs read.

    python tools/merge_sd3_safetensors.py --dit sd3.5_medium_trained.safetensors --clip_l clip_l.safetensors \\
        --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors --output sd3.5_all_in_one.safetensors \\
        --save_precision fp16

Each part gets the names of a whole model (``model.diffusion_model.``, ``first_stage_model.``,
``text_encoders.clip_l.transformer.`` and so on). If two parts have the same name, the later option is used. The
metadata are those of the transformer's file. Files are read and written tensor by tensor. More: docs/sd3.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

logger = logging.getLogger(__name__)

#: option -> prefix of its names in a whole model, and prefixes that are kept
PREFIXES = {
    "dit": ("model.diffusion_model.", ("model.diffusion_model.", "first_stage_model.", "text_encoders.")),
    "vae": ("first_stage_model.", ("first_stage_model.",)),
    "clip_l": ("text_encoders.clip_l.transformer.", ("text_encoders.clip_l.",)),
    "clip_g": ("text_encoders.clip_g.transformer.", ("text_encoders.clip_g.",)),
    "t5xxl": ("text_encoders.t5xxl.transformer.", ("text_encoders.t5xxl.",)),
}


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--dit", required=True, metavar="FILE", help="the transformer, with or without the autoencoder")
    add("--vae", metavar="FILE", help="the autoencoder")
    add("--clip_l", metavar="FILE", help="the CLIP-L text encoder")
    add("--clip_g", metavar="FILE", help="the CLIP-G text encoder")
    add("--t5xxl", metavar="FILE", help="the T5-XXL text encoder")
    add("--output", default="merged_model.safetensors", metavar="FILE", help="the file to write (default %(default)s)")
    add("--device", default="cpu", metavar="DEVICE", help="where to convert dtypes")
    add("--save_precision", metavar="NAME", help="float, fp16, bf16 or fp8 (default: each tensor's own)")
    return parser


@exits_on_user_error
def main(args: argparse.Namespace) -> None:
    """Check every file first, then write.

    Raises:
        SystemExit: with code 2, after one clear line.
    """
    setup_console(ConsoleOptions())
    # only now, as torch takes seconds to load
    import torch

    from library.architectures.common.tensor_files import TensorFile
    from library.config.devices import parse_device
    from library.files.precisions import SAVED, cast, parse_precision
    from library.files.safetensors_io import read_header
    from library.files.streamed import check_target, tensor_info, write_streamed

    parts = {name: Path(getattr(args, name)) for name in PREFIXES if getattr(args, name)}
    for name, path in parts.items():
        if not path.is_file():
            raise UserError(f"--{name} {path}: no such file")
    target = Path(args.output)
    check_target(target, "--output", sources=list(parts.values()))
    device = parse_device("--device", args.device)
    dtype = parse_precision("--save_precision", args.save_precision, SAVED) if args.save_precision else None

    files = {name: TensorFile.open(path) for name, path in parts.items()}
    if not any("joint_blocks." in name for name in files["dit"].shapes):
        raise UserError(f"--dit {parts['dit']}: not a Stable Diffusion 3 transformer (no joint_blocks.)")
    _check_clips(parts, {name: file.shapes for name, file in files.items()})
    places: dict[str, tuple[str, str]] = {}
    for part, file in files.items():
        prefix, known = PREFIXES[part]
        for name in file.shapes:
            whole = name if name.startswith(known) else prefix + name
            if whole in places:
                logger.warning("%s is in both %s and %s; the one of %s is used", whole, *(places[whole][0], part), part)
            places[whole] = (part, name)

    def saved(whole: str) -> torch.dtype:
        part, name = places[whole]
        own = files[part].dtypes[name]
        return dtype if dtype is not None and own.is_floating_point else own

    def read(whole: str) -> torch.Tensor:
        part, name = places[whole]
        tensor = next(files[part].read([name]))[1]
        return tensor if tensor.dtype == saved(whole) else cast(tensor.to(device), saved(whole)).cpu()

    infos = {whole: tensor_info(saved(whole), files[part].shapes[name]) for whole, (part, name) in places.items()}
    write_streamed(target, infos, read, read_header(parts["dit"]).metadata)
    logger.info("%d tensors of %s written to %s", len(places), ", ".join(parts), target)


def _check_clips(parts: Mapping[str, Path], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise UserError where a text encoder is none, or CLIP-L and CLIP-G are exchanged: their names are the same."""
    widths = {}
    for part in ("clip_l", "clip_g", "t5xxl"):
        if part not in parts:
            continue
        ending = "token_embedding.weight" if part.startswith("clip") else "shared.weight"
        found = [shape for name, shape in shapes[part].items() if name.endswith(ending)]
        if not found:
            raise UserError(f"--{part} {parts[part]}: not this text encoder (no {ending})")
        widths[part] = found[0][-1]
    if widths.get("clip_l", 0) >= widths.get("clip_g", 1 << 30):
        raise UserError(
            f"--clip_l {parts['clip_l']} is not narrower than --clip_g {parts['clip_g']} ({widths['clip_l']} and "
            f"{widths['clip_g']}); exchange them"
        )


if __name__ == "__main__":
    main(setup_parser().parse_args())
