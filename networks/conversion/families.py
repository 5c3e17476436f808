"""The families whose adapter files can be renamed: their parts, prefixes, and how to recognize them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from library.architectures.flux.names import LINEARS
from library.errors import UserError
from networks.conversion.modules import CLIP, FLUX, T5, ModulePaths, unet_paths
from networks.file_names import PEFT_ROOT

Naming = Literal["kohya", "diffusers", "peft", "comfyui"]
NAMINGS: tuple[Naming, ...] = ("kohya", "diffusers", "peft", "comfyui")
#: the module paths of each naming
Space = Literal["original", "diffusers"]


@dataclass(frozen=True)
class Part:
    """One model of a family.

    Attributes:
        kohya, diffusers, comfyui: prefixes of its modules' names; the first is written, all are read.
        published: whose paths the published (kohya) names have.
    """

    paths: ModulePaths
    kohya: tuple[str, ...]
    diffusers: str
    comfyui: tuple[str, ...]
    published: Space = "original"

    def space(self, naming: Naming) -> Space:
        if naming == "kohya":
            return self.published
        return "original" if naming == "comfyui" else "diffusers"

    def prefixes(self, naming: Naming) -> tuple[str, ...]:
        """Return the prefixes of its modules' names; PEFT's are read under diffusers' names."""
        if naming == "kohya":
            return self.kohya
        return tuple(f"{name}." for name in (self.comfyui if naming == "comfyui" else (self.diffusers,)))

    def name(self, naming: Naming, path: str) -> str:
        """Return a module's name in a file, from its path in ``space(naming)``."""
        if naming == "kohya":
            return self.kohya[0] + path.replace(".", "_")
        return (PEFT_ROOT if naming == "peft" else self.prefixes(naming)[0]) + path


@dataclass(frozen=True)
class Family:
    """A family of models; ``parts`` begins with the denoiser."""

    key: str  # for --family
    title: str
    parts: tuple[Part, ...]


def _text(kohya: str, diffusers: str, *comfyui: str, paths: ModulePaths = CLIP, also: tuple[str, ...] = ()) -> Part:
    return Part(paths, (kohya, *also), diffusers, tuple(f"text_encoders.{name}.transformer" for name in comfyui))


def _unet(attention: tuple[bool, ...], published: Space, **config: str) -> Part:
    return Part(unet_paths(attention, **config), ("lora_unet_",), "unet", ("diffusion_model",), published)


_SD_UNET = _unet((True, True, True, False), "diffusers")
SD1 = Family("sd", "Stable Diffusion 1.x", (_SD_UNET, _text("lora_te_", "text_encoder", "clip_l")))
SD2 = Family("sd2", "Stable Diffusion 2.x", (_SD_UNET, _text("lora_te_", "text_encoder", "clip_h")))
SDXL_FAMILY = Family(
    "sdxl",
    "Stable Diffusion XL",
    (
        _unet((False, True, True), "original", addition_embed_type="text_time"),
        _text("lora_te1_", "text_encoder", "clip_l"),
        _text("lora_te2_", "text_encoder_2", "clip_g"),
    ),
)


def _flux(key: str, title: str) -> Family:
    # lora_transformer_: the same with diffusers' paths, which some trainers write
    denoiser = Part(FLUX, ("lora_unet_", "lora_transformer_"), "transformer", ("diffusion_model",))
    clip = _text("lora_te1_", "text_encoder", "clip_l")
    # T5 is the third encoder, as in SD3's files; OneTrainer counts two
    t5 = _text("lora_te3_", "text_encoder_2", "t5xxl", paths=T5, also=("lora_te2_",))
    return Family(key, title, (denoiser, clip, t5))


FLUX_FAMILY, CHROMA = _flux("flux", "FLUX.1"), _flux("chroma", "Chroma")
FLUX_OR_CHROMA = _flux("flux", "FLUX.1 or Chroma")  # the same names
FAMILIES = {family.key: family for family in (SD1, SD2, SDXL_FAMILY, FLUX_FAMILY, CHROMA)}

#: names that only files of unsupported families have
_OTHERS = {
    "joint_blocks": "Stable Diffusion 3",
    "img_mlp_fc1": "HunyuanImage",
    "img_mod_linear": "HunyuanImage",
    "context_refiner": "Lumina",
    "cap_embedder": "Lumina",
    "lora_unet_blocks_": "Anima",
    "diffusion_model.blocks.": "a video model or Anima",
}


def detect_naming(names: Mapping[str, object], title: str) -> Naming:
    """Return the program whose names a file has.

    Raises:
        UserError: no known program.
    """
    # FLUX.1's modules also come without the name of the model
    bare_original, bare_diffusers = (
        {f"{path.partition('.')[0]}." for path in paths} for paths in (LINEARS, chain.from_iterable(LINEARS.values()))
    )
    starts: dict[Naming, tuple[str, ...]] = {
        "kohya": ("lora_unet_", "lora_te", "lora_transformer_", "oft_unet_"),
        "peft": (PEFT_ROOT,),
        "comfyui": ("diffusion_model.", "text_encoders.", *bare_original),
        "diffusers": ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", *bare_diffusers),
    }
    found: dict[Naming, str] = {}
    for name in names:
        naming = next((naming for naming, begin in starts.items() if name.startswith(begin)), None)
        if naming is None:
            if name.startswith("lllite_unet_"):
                raise UserError(f"{title}: {name}: a ControlNet-LLLite, which no other program has a name for")
            raise UserError(f"{title}: {name} is no name of an adapter's tensor: is the file a LoRA?")
        found.setdefault(naming, name)
    if not found:
        raise UserError(f"{title}: the file holds no tensors")
    if len(found) > 1:
        examples = " and ".join(f"{name} ({naming})" for naming, name in found.items())
        raise UserError(f"{title}: holds names of several programs: {examples}; merge or split such a file first")
    return next(iter(found))


def detect_family(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], title: str) -> Family:
    """Return the family that a file was made for, from names, widths and metadata.

    Raises:
        UserError: another family, or ambiguous names.
    """
    text = "\n".join(shapes).replace(".", "_")
    for piece, other in _OTHERS.items():
        if piece.replace(".", "_") in text:
            raise UserError(f"{title}: made for {other}, whose names are not known yet")
    told = " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")).lower()
    is_flux = r"double_blocks_|single_blocks_|single_transformer_blocks_|distilled_guidance|norm1_linear|add_q_proj"
    is_flux += r"|(^|\n)(lora_|base_model_model_)?transformer_|SelfAttention"
    if re.search(is_flux, text) or "flux" in told or "chroma" in told:
        if "chroma" in told or "distilled_guidance" in text:
            return CHROMA
        # layers that Chroma lacks
        only_flux = r"_mod_lin|_modulation_lin|norm1_linear|norm_linear|norm1_context|(time|vector|guidance)_(in|text)_"
        return FLUX_FAMILY if "flux" in told or re.search(only_flux, text) else FLUX_OR_CHROMA
    widths = {s[1] for n, s in shapes.items() if re.search(r"attn2[._]to_[kv]\.[\w.]*(down|_A)", n) and len(s) > 1}
    text_widths = {s[1] for n, s in shapes.items() if re.search(r"self_attn.q_proj\.[\w.]*(down|_A)", n) and len(s) > 1}
    # SD's U-Net has transformers at its first level and in pairs of one, SDXL's has neither
    has_first = re.search(r"down_blocks_0_attentions|input_blocks_[12]_1_|output_blocks_(9|10|11)_|up_blocks_3_", text)
    is_xl = re.search(r"lora_te[12]_|text_encoder_2_|_clip_g_|transformer_blocks_[1-9]|label_emb|add_embedding", text)
    sdxl_blocks = re.search(r"lora_unet_(input_blocks|output_blocks|middle_block)_", text)
    if not has_first and (is_xl or sdxl_blocks or 2048 in widths or "xl" in told):
        return SDXL_FAMILY
    is_sd2 = 1024 in widths | text_widths or metadata.get("ss_v2") == "True" or "_clip_h_" in text
    if is_sd2 or "stable-diffusion-v2" in told or told.startswith("sd_v2"):
        return SD2
    if has_first or widths & {768} or "lora_te_" in text or "sd_v1" in told or "stable-diffusion-v1" in told:
        return SD1
    raise UserError(f"{title}: its names fit Stable Diffusion and SDXL; say which with --family")
