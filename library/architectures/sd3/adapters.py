"""Names of adapters of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import re
from functools import partial

from library.architectures.adapters import (
    AdapterFamily,
    AdapterNaming,
    Evidence,
    ModelRecord,
    Shapes,
    TablePaths,
    places_below,
)
from library.architectures.common.adapter_names import clip_naming, t5_naming
from library.architectures.sd3.names import LAYOUTS, LINEARS, SIGN

TRANSFORMER = AdapterNaming(
    "transformer",
    # only its number identifies the last block, where diffusers swaps the halves of the text's modulation
    TablePaths(
        LINEARS,
        swapped=frozenset({"final_layer.adaLN_modulation.1"}),
        own_roots=frozenset({"joint_blocks"}),  # the other names are also those of FLUX.1's layers in diffusers
    ),
    kohya=("lora_unet_",),
    diffusers="transformer",
    comfyui=("diffusion_model",),
    locate=partial(places_below, sign=SIGN),
    usual=re.compile(r"^joint_blocks\."),
)
_BELOW = "text_encoders.{}.transformer."
CLIP_L = clip_naming("CLIP-L", "lora_te1_", "text_encoder", "clip_l", below=(_BELOW.format("clip_l"), "text_encoder."))
CLIP_G = clip_naming(
    "CLIP-G", "lora_te2_", "text_encoder_2", "clip_g", below=(_BELOW.format("clip_g"), "text_encoder_2.")
)
T5XXL = t5_naming(("lora_te3_",), "text_encoder_3")

#: inputs of layers in the blocks of each size of the model; diffusers names these layers as in other transformers
_WIDTHS = frozenset(scale * width for width in (1536, 2432) for scale in (1, 4))
#: of models with these names, and without the lists of ``_NOT_HERE`` in a file: HunyuanImage-2.1's twenty
_DEEPEST_OTHER = 20
_NOT_HERE = re.compile(r"single_transformer_blocks|double_blocks|single_blocks")


def _claims(found: Evidence) -> bool:
    if _NOT_HERE.search(found.text):
        return False
    is_recorded = "stable-diffusion-3" in found.recorded or "sd3" in found.recorded
    if is_recorded or "joint_blocks_" in found.text:
        return True
    # metadata that tells of another model counts more than widths and depth
    is_deep = found.blocks("transformer_blocks") > _DEEPEST_OTHER
    return not found.recorded and (is_deep or bool(found.block_widths & _WIDTHS))


#: by ``ss_base_model_version``
RECORDS = {
    version: ModelRecord(version, False, f"stable-diffusion-3-{version}", "diffusers", "1024x1024")
    for version in ("medium", "5-medium", "5-large")
}


def _model_record(shapes: Shapes) -> ModelRecord:
    prefix = LAYOUTS.prefix(shapes)
    has_norm = f"{prefix}joint_blocks.0.context_block.attn.ln_k.weight" in shapes
    is_dual = f"{prefix}joint_blocks.0.x_block.attn2.ln_k.weight" in shapes
    return RECORDS["medium" if not has_norm else "5-medium" if is_dual else "5-large"]


ADAPTERS = (
    AdapterFamily(
        "sd3",
        "Stable Diffusion 3",
        (TRANSFORMER, CLIP_L, CLIP_G, T5XXL),
        _claims,
        tuple(RECORDS.values()),
        "networks.lora_sd3",
        opens=LAYOUTS.open_theirs,
        model_record=_model_record,
    ),
)
