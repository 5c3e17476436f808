"""Find out which program's names an adapter file has, and which family it was made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from library.architectures.adapters import AdapterFamily, AdapterNaming, Evidence, Naming, Shapes
from library.architectures.registry import adapter_families
from library.errors import UserError
from networks.file_names import PEFT_ROOT

#: FLUX.1's names, of which some are others; its lists are shorter
_VIDEO = re.compile(r"_blocks_\d+_((img|txt)_(attn|mlp|mod)_|linear[12]|modulation_linear)")
#: unsupported families, and how their files are known
_OTHERS: dict[str, Callable[[Evidence], bool]] = {
    "Anima": lambda found: "lora_unet_blocks_" in found.text,
    "a video model or Anima": lambda found: "diffusion_model_blocks_" in found.text,
    "HunyuanVideo": lambda found: (
        bool(_VIDEO.search(found.text))
        and 3072 in found.block_widths
        and (found.blocks("double_blocks") == 20 or found.blocks("single_blocks") == 40)
    ),
}
#: prefix of the names in this project's own layout of OFT, see oft.py
OWN_OFT = "oft_unet_"


def namings() -> Iterator[AdapterNaming]:
    """Return the namings of every model of every family."""
    for family in adapter_families():
        yield from family.parts


def family_named(key: str) -> AdapterFamily:
    """Return the family that ``--family`` names; one of ``About.adapter_keys``."""
    return next(family for family in adapter_families() if family.key == key)


def network_modules() -> frozenset[str]:
    """Return the network modules of all families."""
    return frozenset(family.network_module for family in adapter_families())


def detect_naming(names: Mapping[str, object], title: str) -> Naming:
    """Return which program's names a file has.

    Raises:
        UserError: the names of no known program.
    """
    parts = list(namings())
    # some programs leave out the name of the denoiser
    bare_original, bare_diffusers = (
        {f"{root}." for part in parts for root in part.paths.bare_roots(space)} for space in ("original", "diffusers")
    )
    starts: dict[Naming, tuple[str, ...]] = {
        "kohya": ("lora_te", OWN_OFT, *(prefix for part in parts for prefix in part.kohya)),
        "peft": (PEFT_ROOT,),
        "comfyui": ("diffusion_model.", "text_encoders.", *bare_original),
        "diffusers": (*(f"{part.diffusers}." for part in parts), *bare_diffusers),
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


def detect_family(shapes: Shapes, metadata: Mapping[str, str], title: str) -> AdapterFamily:
    """Return the family that a file was made for, from names, widths and metadata.

    Raises:
        UserError: an unsupported family, or the file fits several.
    """
    found = _evidence(shapes, metadata)
    for other, is_it in _OTHERS.items():
        if is_it(found):
            raise UserError(f"{title}: made for {other}, whose names are not known yet")
    family = next((family for family in adapter_families() if family.claims(found)), None)
    if family is None:
        raise UserError(f"{title}: its names fit several families; say which with --family")
    return family


def _evidence(shapes: Shapes, metadata: Mapping[str, str]) -> Evidence:
    def widths(pattern: str) -> frozenset[int]:
        return frozenset(s[1] for name, s in shapes.items() if len(s) > 1 and re.search(pattern, name))

    recorded = (
        " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")).strip().lower()
    )
    return Evidence(
        text="\n".join(shapes).replace(".", "_"),
        recorded=recorded,
        metadata=metadata,
        attention_widths=widths(r"attn2[._]to_[kv]\.[\w.]*(down|_A)"),
        text_widths=widths(r"self_attn.q_proj\.[\w.]*(down|_A)"),
        block_widths=widths(r"(^|[._])((double|single)_blocks|transformer_blocks)[._]\d+[._][\w.]*(down|_A)"),
    )


def family_of_model(shapes: Shapes) -> AdapterFamily | None:
    """Return the family whose parts a file or folder holds, all of them or else the most; None if it holds none."""

    def measure(family: AdapterFamily) -> tuple[bool, int]:
        count = sum(bool(part.locate(shapes)) for part in family.parts) if family.fits(shapes) else 0
        return count == len(family.parts), count

    found = max(adapter_families(), key=measure)  # the first of several
    return found if measure(found)[1] else None
