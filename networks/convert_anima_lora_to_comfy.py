"""Convert a LoRA of Anima to the names that ComfyUI reads, and back.

    python networks/convert_anima_lora_to_comfy.py my_lora.safetensors my_lora_comfyui.safetensors
    python networks/convert_anima_lora_to_comfy.py --reverse my_lora_comfyui.safetensors my_lora.safetensors

Only names change. Metadata are kept, and their hashes computed again.

Exit codes: 0 converted, 1 the file already has these names, 2 it cannot be converted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

if __package__ in (None, ""):  # run as a script: the repository is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError, exits_on_user_error
from networks.files.comfyui_script import Renaming, renaming_parser

T = TypeVar("T")

#: published prefix -> ComfyUI's
_PREFIXES = {"lora_unet_": "diffusion_model.", "lora_te_": "text_encoders.qwen3_06b.transformer.model."}
#: published last part of a tensor's name -> ComfyUI's
_LEAVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
#: parts of the model's names that have underscores of their own
_COMPOUND = """
    adaln_modulation_cross_attn adaln_modulation_mlp adaln_modulation_self_attn adaln_modulation
    cross_attn self_attn k_norm q_norm k_proj q_proj v_proj o_proj out_proj output_proj up_proj down_proj gate_proj
    norm_cross_attn norm_mlp norm_self_attn final_layer llm_adapter pos_embedder t_embedder t_embedding_norm x_embedder
    linear_1 linear_2 embed_tokens input_layernorm post_attention_layernorm
""".split()
#: how paths of layers begin, by the published prefix
_ROOTS = {
    "lora_unet_": re.compile(r"(blocks_\d|llm_adapter_|final_layer_|[tx]_embedder_|pos_embedder_|t_embedding_norm)"),
    "lora_te_": re.compile(r"(layers_\d|embed_tokens|norm)"),
}
#: one part, the longest that fits
_PART = re.compile("|".join([*sorted((rf"{name}(?=_|$)" for name in _COMPOUND), key=len, reverse=True), "[^_]+"]))


def setup_parser() -> argparse.ArgumentParser:
    return renaming_parser(__doc__)


def comfyui_name(name: str) -> str | None:
    """Return ComfyUI's name of a tensor with a published name; None for other names."""
    module, _, leaf = name.partition(".")
    for published, comfyui in _PREFIXES.items():
        path = module.removeprefix(published)
        if module.startswith(published) and leaf in _LEAVES and _ROOTS[published].match(path):
            return f"{comfyui}{'.'.join(_PART.findall(path))}.{_LEAVES[leaf]}"
    return None


def published_name(name: str) -> str | None:
    """Return the published name of a tensor with ComfyUI's name; None for other names."""
    for published, comfyui in _PREFIXES.items():
        for leaf, theirs in _LEAVES.items():
            if name.startswith(comfyui) and name.endswith(f".{theirs}"):
                module = name.removeprefix(comfyui).removesuffix(f".{theirs}")
                return f"{published}{module.replace('.', '_')}.{leaf}"
    return None


def renamed(weights: Mapping[str, T], *, reverse: bool) -> tuple[dict[str, T], list[str]]:
    """Return the tensors under the other names, and those names that are not known and stay."""
    convert = published_name if reverse else comfyui_name
    found, unknown = {}, []
    for name, tensor in weights.items():
        new = convert(name)
        if new is None:
            unknown.append(name)
        found[new or name] = tensor
    return found, unknown


@exits_on_user_error
def main(args: argparse.Namespace) -> int:
    """Convert, print what was done, and return the exit code."""
    renaming = Renaming.of(args)
    source, weights = renaming.source, renaming.weights
    # only now, as torch takes seconds to load
    from library.architectures.registry import adapter_families

    if any(renaming.version == record.base_version for family in adapter_families() for record in family.records):
        raise UserError(f"{source}: not a LoRA of Anima, but of another model ({renaming.version})")
    state, unknown = renamed(weights, reverse=args.reverse)
    if len(unknown) == len(weights):
        there = comfyui_name if args.reverse else published_name
        if any(there(name) is not None for name in weights):
            return renaming.done_already()
        raise UserError(f"{source}: not a LoRA of Anima (its first tensor is {renaming.first})")
    if unknown:
        print(f"warning: {len(unknown)} names are not known and stay, such as {unknown[0]}", file=sys.stderr)
    return renaming.write(state, len(state) - len(unknown))


if __name__ == "__main__":
    sys.exit(main(setup_parser().parse_args()))
