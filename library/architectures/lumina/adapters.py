"""Names of adapters of Lumina-Image 2.0 and of its text encoder, Gemma2."""

from __future__ import annotations

import re
from functools import partial

from library.architectures.adapters import (
    AdapterFamily,
    AdapterNaming,
    Evidence,
    ModelRecord,
    SamePaths,
    TablePaths,
    places_below,
)
from library.architectures.lumina.names import LAYOUTS, LINEARS, QKV, SIGN, qkv_widths


class LuminaPaths(TablePaths):
    """The transformer, whose keys and values have fewer heads than its queries."""

    def __init__(self) -> None:
        # both layouts have lists of the same names, so a file without the model's name could be either
        super().__init__(LINEARS, own_roots=frozenset())

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        if original.endswith(QKV):
            return list(qkv_widths(inputs, outputs))
        return super().rows(original, inputs=inputs, outputs=outputs)


TRANSFORMER = AdapterNaming(
    "transformer",
    LuminaPaths(),
    kohya=("lora_unet_",),
    diffusers="transformer",
    comfyui=("diffusion_model",),
    locate=partial(places_below, sign=SIGN),
    usual=re.compile(r"^(layers|noise_refiner|context_refiner)\.\d+\.|^final_layer\."),
)
GEMMA2 = AdapterNaming(
    "Gemma2",
    SamePaths(
        """
        layers self_attn q_proj k_proj v_proj o_proj mlp gate_proj up_proj down_proj input_layernorm
        post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm embed_tokens norm
        """.split()
    ),
    kohya=("lora_te_",),
    diffusers="text_encoder",
    comfyui=("text_encoders.gemma2_2b.transformer.model",),
    locate=partial(places_below, sign="layers.0.pre_feedforward_layernorm."),
    usual=re.compile(r"\.(self_attn|mlp)\."),
)

_NAMES = re.compile(
    r"context_refiner|noise_refiner|cap_embedder|time_caption_embed|layers_\d+_(attention|feed_forward)_"
)
#: of an encoder without the transformer: names that other families' encoders of this prefix lack
_GEMMA2_ONLY = re.compile(r"lora_te_layers_\d+_(self_attn_o_proj|mlp_gate_proj)")


def _claims(found: Evidence) -> bool:
    return bool(_NAMES.search(found.text) or _GEMMA2_ONLY.search(found.text)) or "lumina" in found.recorded


RECORD = ModelRecord("lumina2", False, "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "1024x1024")


ADAPTERS = (
    AdapterFamily(
        "lumina",
        "Lumina-Image 2.0",
        (TRANSFORMER, GEMMA2),
        _claims,
        (RECORD,),
        "networks.lora_lumina",
        opens=LAYOUTS.open_theirs,
    ),
)
