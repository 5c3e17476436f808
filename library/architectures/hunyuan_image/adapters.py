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
)
from library.architectures.hunyuan_image.names import FINAL, LAYOUTS, LINEARS, SIGN


class HunyuanPaths(TablePaths):
    """Double blocks stack query, key and value; single blocks the MLP's first layer too."""

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


def _claims(found: Evidence) -> bool:
    return "hunyuan" in found.recorded or bool(_NAMES.search(found.text))


RECORD = ModelRecord("hunyuan-image-2.1", False, "hunyuan-image-2.1", "diffusers", "512x512")


ADAPTERS = (
    AdapterFamily(
        "hunyuan_image",
        "HunyuanImage-2.1",
        (TRANSFORMER,),
        _claims,
        (RECORD,),
        "networks.lora_hunyuan_image",
        unwritten={
            "comfyui": "ComfyUI has other names for these layers than the model's files; "
            "use networks/convert_hunyuan_image_lora_to_comfy.py"
        },
        opens=LAYOUTS.open_theirs,
    ),
)
