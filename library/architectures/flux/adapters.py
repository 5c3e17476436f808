"""Names of adapters of FLUX.1 and Chroma, whose modules are a part of FLUX.1's and its approximator."""

from __future__ import annotations

import re
from collections.abc import Callable
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
from library.architectures.common.joined_layout import open_theirs
from library.architectures.flux.diffusers_layout import in_diffusers_layout, published_view
from library.architectures.flux.names import (
    CHROMA,
    DEV,
    LINEARS,
    SCHNELL,
    SIGN,
    SWAPPED_HALVES,
    Variant,
    file_prefix,
    part_rows,
)


class FluxPaths(TablePaths):
    """FLUX.1 and Chroma, whose modules are a part of FLUX.1's and its approximator."""

    def __init__(self) -> None:
        super().__init__(LINEARS, swapped=SWAPPED_HALVES)

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        parts = len(self.to_diffusers(original))
        if parts == 1:
            return super().rows(original, inputs=inputs, outputs=outputs)
        return part_rows(parts, inputs=inputs, outputs=outputs)


#: also with diffusers' paths below lora_transformer_, as some trainers write it
TRANSFORMER = AdapterNaming(
    "transformer",
    FluxPaths(),
    kohya=("lora_unet_", "lora_transformer_"),
    diffusers="transformer",
    comfyui=("diffusion_model",),
    locate=partial(places_below, sign=SIGN),
    usual=re.compile(r"^(double|single)_blocks\."),
)
CLIP_L = clip_naming("CLIP-L", "lora_te1_", "text_encoder", "clip_l")
#: the third encoder, as in SD3's files; OneTrainer counts two
T5XXL = t5_naming(("lora_te3_", "lora_te2_"), "text_encoder_2")

_NAMES = re.compile(
    r"double_blocks_|single_blocks_|single_transformer_blocks_|distilled_guidance|norm1_linear|add_q_proj"
    r"|(^|\n)(lora_|base_model_model_)?transformer_|SelfAttention"
)
#: what Chroma lacks
_FLUX_ONLY = re.compile(
    r"_mod_lin|_modulation_lin|norm1_linear|norm_linear|norm1_context|(time|vector|guidance)_(in|text)_"
)


def _is_either(found: Evidence) -> bool:
    return bool(_NAMES.search(found.text)) or "flux" in found.recorded or "chroma" in found.recorded


def _is_chroma(found: Evidence) -> bool:
    return _is_either(found) and ("chroma" in found.recorded or "distilled_guidance" in found.text)


def _is_flux(found: Evidence) -> bool:
    return _is_either(found) and ("flux" in found.recorded or bool(_FLUX_ONLY.search(found.text)))


_BFL = "https://github.com/black-forest-labs/flux"
#: records of the transformers; the first is the default
RECORDS = {
    DEV: ModelRecord("flux1", False, "flux-1-dev", _BFL, "1024x1024"),
    SCHNELL: ModelRecord("flux1", False, "flux-1-schnell", _BFL, "1024x1024"),
    CHROMA: ModelRecord("chroma", False, "chroma", "https://huggingface.co/lodestones/Chroma", "1024x1024"),
}
_PARTS = (TRANSFORMER, CLIP_L, T5XXL)


def _model_record(shapes: Shapes) -> ModelRecord:
    prefix = file_prefix(shapes)
    return RECORDS[Variant.of(name[len(prefix) :] for name in shapes if name.startswith(prefix)).kind]


def _family(key: str, title: str, claims: Callable[[Evidence], bool], *kinds: str) -> AdapterFamily:
    records = tuple(RECORDS[kind] for kind in kinds)
    return AdapterFamily(
        key,
        title,
        _PARTS,
        claims,
        records,
        "networks.lora_flux",
        opens=partial(open_theirs, is_theirs=in_diffusers_layout, view=published_view),
        model_record=_model_record,
    )


#: the same names for both, so that the third is what names alone often tell
ADAPTERS = (
    _family("chroma", "Chroma", _is_chroma, CHROMA),
    _family("flux", "FLUX.1", _is_flux, DEV, SCHNELL),
    _family("flux_or_chroma", "FLUX.1 or Chroma", _is_either, DEV, SCHNELL, CHROMA),
)
