"""Names of adapters of HunyuanImage-2.1."""

from __future__ import annotations

import re
from functools import partial

from library.architectures.adapters import (
    AdapterFamily,
    AdapterNaming,
    Evidence,
    ModelRecord,
    TablePaths,
    places_below,
    with_published_ending,
)
from library.architectures.hunyuan_image.names import COMFYUI_ENDINGS, FINAL, LAYOUTS, LINEARS, SIGN


class HunyuanPaths(TablePaths):
    """Double blocks stack query, key and value; single blocks the MLP's first layer too."""

    def dotted(self, underscored: str) -> str | None:
        return super().dotted(with_published_ending(underscored, COMFYUI_ENDINGS))

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        parts = len(self.to_diffusers(original))
        if parts < 4:
            return super().rows(original, inputs=inputs, outputs=outputs)
        return [inputs] * 3 + [4 * inputs if outputs is None else outputs - 3 * inputs]


TRANSFORMER = AdapterNaming(
    "transformer",
    # the names of the blocks are also those of FLUX.1
    HunyuanPaths(LINEARS, swapped=frozenset({FINAL}), own_roots=frozenset()),
    kohya=("lora_unet_",),
    diffusers="transformer",
    comfyui=("diffusion_model",),
    locate=partial(places_below, sign=SIGN),
    usual=re.compile(r"^(double|single)_blocks\."),
)
#: what FLUX.1 calls img_mlp_0, img_mod_lin and modulation_lin
_NAMES = re.compile(r"_blocks_\d+_((img|txt)_(mlp_fc|mod_linear)|modulation_linear)")
#: inputs of layers in the blocks: the model's width, that of its MLP, and both side by side
_WIDTHS = frozenset({3584, 14336, 3584 + 14336})
#: blocks of the model by their lists' names: published, and in diffusers; FLUX.1 has one or two less
_COUNTS = {"double_blocks": 20, "single_blocks": 40, "single_transformer_blocks": 40}


def _claims(found: Evidence) -> bool:
    if "hunyuan" in found.recorded or _NAMES.search(found.text):
        return True
    # ComfyUI and diffusers name the layers as they name FLUX.1's; metadata that tells of another model counts more
    has_blocks = any(found.blocks(name) == count for name, count in _COUNTS.items())
    return not found.recorded and (bool(found.block_widths & _WIDTHS) or (has_blocks and not found.block_widths))


RECORD = ModelRecord("hunyuan-image-2.1", False, "hunyuan-image-2.1", "diffusers", "512x512")


ADAPTERS = (
    AdapterFamily(
        "hunyuan_image",
        "HunyuanImage-2.1",
        (TRANSFORMER,),
        _claims,
        (RECORD,),
        "networks.lora_hunyuan_image",
        other_endings=COMFYUI_ENDINGS,
        unwritten={
            "comfyui": "ComfyUI has other names for these layers than the model's files; "
            "use networks/convert_hunyuan_image_lora_to_comfy.py"
        },
        opens=LAYOUTS.open_theirs,
    ),
)
