"""Convert a LoRA of HunyuanImage-2.1 to the names that ComfyUI reads, and back.

    python networks/convert_hunyuan_image_lora_to_comfy.py my_lora.safetensors my_lora_comfyui.safetensors
    python networks/convert_hunyuan_image_lora_to_comfy.py --reverse my_lora_comfyui.safetensors my_lora.safetensors

Only names change, of the layers that ComfyUI calls as FLUX.1 does. Metadata are kept, and their hashes computed again.
--reverse reads files that this script wrote; those of other programs may have other names.

Exit codes: 0 converted, 1 the file already has these names, 2 it cannot be converted.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.tool_parser import tool_parser
from library.errors import UserError, exits_on_user_error

#: endings of modules' names -> those of ComfyUI
_NAMES = {
    "img_mlp_fc1": "img_mlp_0",
    "img_mlp_fc2": "img_mlp_2",
    "txt_mlp_fc1": "txt_mlp_0",
    "txt_mlp_fc2": "txt_mlp_2",
    "img_mod_linear": "img_mod_lin",
    "txt_mod_linear": "txt_mod_lin",
    "modulation_linear": "modulation_lin",
}
_MODULE = re.compile(r"(lora_unet_(?:double|single)_blocks_\d+_)(\w+)")


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("src_path", type=str, default=None, help="LoRA to convert")
    parser.add_argument("dst_path", type=str, default=None, help=".safetensors file to write")
    parser.add_argument("--reverse", action="store_true", help="convert from ComfyUI's names to the published ones")
    return parser


def renamed(name: str, *, reverse: bool) -> str:
    """Return a tensor's name in the other layout; the same where both agree."""
    table = {comfyui: published for published, comfyui in _NAMES.items()} if reverse else _NAMES
    module, dot, leaf = name.partition(".")
    found = _MODULE.fullmatch(module)
    return f"{found[1]}{table.get(found[2], found[2])}{dot}{leaf}" if found else name


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Convert, print what was done, and return the exit code."""
    # only now, as torch takes seconds to load
    from library.files.safetensors_io import is_pickle, read_header
    from library.files.streamed import check_target
    from networks.weights import read_weights, write_weights

    source, target = Path(args.src_path), Path(args.dst_path)
    weights = read_weights(source)
    check_target(target, "dst_path", sources=[source])
    metadata = {} if is_pickle(source) else dict(read_header(source).metadata)
    version = metadata.get("ss_base_model_version", "")
    if version and "hunyuan-image" not in version:
        raise UserError(f"{source}: a LoRA of another model ({version}); its names need no conversion")
    if not any(_MODULE.fullmatch(name.partition(".")[0]) for name in weights):
        raise UserError(f"{source}: not a LoRA of HunyuanImage-2.1 (its first tensor is {next(iter(weights), 'none')})")
    state = {renamed(name, reverse=args.reverse): tensor for name, tensor in weights.items()}
    changed = len(state.keys() - weights.keys())
    if not changed:
        names = "the published names" if args.reverse else "ComfyUI's names"
        print(f"{source}: already has {names}; nothing to do", file=sys.stderr)
        return 1
    write_weights(target, state, None, metadata or None)
    print(f"renamed {changed} of {len(state)} tensors\nwritten: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
