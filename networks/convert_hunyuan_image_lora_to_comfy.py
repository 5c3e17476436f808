"""Convert a LoRA of HunyuanImage-2.1 to the names that ComfyUI reads, and back.

    python networks/convert_hunyuan_image_lora_to_comfy.py my_lora.safetensors my_lora_comfyui.safetensors
    python networks/convert_hunyuan_image_lora_to_comfy.py --reverse my_lora_comfyui.safetensors my_lora.safetensors

Only names change, of the layers that ComfyUI calls as FLUX.1 does. Metadata are kept, and their hashes computed again.
--reverse reads files that this script wrote; those of other programs may have other names.

Exit codes: 0 converted, 1 the file already has these names, 2 it cannot be converted.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the suite is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError, exits_on_user_error
from networks.files.comfyui_script import Renaming, renaming_parser

_MODULE = re.compile(r"(lora_unet_(?:double|single)_blocks_\d+_)(\w+)")


def setup_parser() -> argparse.ArgumentParser:
    return renaming_parser(__doc__)


@functools.cache
def _endings() -> Mapping[str, str]:
    """Return the endings of modules' names in ComfyUI, with the published ones."""
    from networks.files.families import family_named  # only now, as torch takes seconds to load

    return family_named("hunyuan_image").other_endings


def renamed(name: str, *, reverse: bool) -> str:
    """Return a tensor's name in the other layout; the same where both agree."""
    table = _endings() if reverse else {published: comfyui for comfyui, published in _endings().items()}
    module, dot, leaf = name.partition(".")
    found = _MODULE.fullmatch(module)
    return f"{found[1]}{table.get(found[2], found[2])}{dot}{leaf}" if found else name


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Convert, print what was done, and return the exit code."""
    renaming = Renaming.of(args)
    source, weights = renaming.source, renaming.weights
    if renaming.version and "hunyuan-image" not in renaming.version:
        raise UserError(f"{source}: a LoRA of another model ({renaming.version}); its names need no conversion")
    if not any(_MODULE.fullmatch(name.partition(".")[0]) for name in weights):
        raise UserError(f"{source}: not a LoRA of HunyuanImage-2.1 (its first tensor is {renaming.first})")
    state = {renamed(name, reverse=args.reverse): tensor for name, tensor in weights.items()}
    changed = len(state.keys() - weights.keys())
    return renaming.write(state, changed) if changed else renaming.done_already()


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
