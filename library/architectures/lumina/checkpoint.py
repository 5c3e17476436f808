"""Find and recognize all parts of Lumina-Image 2.0 from headers, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.architectures.common import ae
from library.architectures.common.checkpoint import MODEL_FLAG, locate_model, locate_part
from library.architectures.common.loading import ModelSource
from library.architectures.common.tokenizer_files import GEMMA, locate_tokenizer
from library.architectures.lumina import gemma2
from library.architectures.lumina.adapters import RECORD
from library.architectures.lumina.names import LAYOUTS
from library.architectures.lumina.options import LuminaOptions
from library.architectures.lumina.sizes import NextDiTSizes, infer_sizes
from library.architectures.model_info import ModelInfo
from library.errors import UserError, naming
from library.files.safetensors_io import read_header

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
#: part of a pipeline's folder, and prefix in the file of a whole model
_OWN = {"gemma2": ("text_encoder", gemma2.BUNDLED), "ae": ("vae", "vae.")}
_NEEDED = {
    "gemma2": "name the Gemma2 text encoder, gemma_2_2b_fp16.safetensors or the like",
    "ae": "name the autoencoder, ae.safetensors of FLUX.1",
}


@dataclass(frozen=True)
class LuminaCheckpoint:
    """A recognized model, and the places of its parts."""

    info: ModelInfo
    path: str
    sizes: NextDiTSizes
    transformer: ModelSource
    text_encoder: ModelSource
    vae: ModelSource
    tokenizer_folder: Path


def inspect_model(
    path_or_id: str | None, options: LuminaOptions, *, tokenizer_cache_dir: str | None
) -> LuminaCheckpoint:
    """Find and recognize the model; see ``Architecture.inspect``."""
    path = locate_model(path_or_id or "", COMPONENTS)
    with naming(MODEL_FLAG, path_or_id):
        transformer = LAYOUTS.source(path, infer_sizes)
        own = _own_parts(path)
    parts = {name: getattr(options, name) or own.get(name, "") for name in _OWN}
    if missing := [f"--{name}: {_NEEDED[name]}" for name in _OWN if not parts[name]]:
        raise UserError("\n".join(missing))
    place = locate_part(parts["gemma2"], gemma2.FLAG, "text_encoder")
    with naming(gemma2.FLAG, parts["gemma2"]):
        encoder = gemma2.gemma2_source(place)
    sizes: NextDiTSizes = transformer.config["sizes"]
    if (width := encoder.config["hidden_size"]) != sizes.caption:
        raise UserError(
            f"{gemma2.FLAG} {parts['gemma2']}: gives states of width {width}, the transformer takes {sizes.caption}; "
            "give Gemma2 2B"
        )
    with naming("--ae", parts["ae"]):
        vae = ae.ae_source(parts["ae"])
    return LuminaCheckpoint(
        info=ModelInfo(family="lumina", version=RECORD.base_version, description="Lumina-Image 2.0"),
        path=str(path),
        sizes=sizes,
        transformer=transformer,
        text_encoder=encoder,
        vae=vae,
        tokenizer_folder=locate_tokenizer(
            gemma2.TOKENIZERS,
            model_folder=path if path.is_dir() else place.parent,
            cache_dir=tokenizer_cache_dir,
            kind=GEMMA,
            inside=lambda: gemma2.own_tokenizer(encoder.file),
        ),
    )


def _own_parts(path: Path) -> dict[str, str]:
    """Return the parts that the transformer's own pipeline folder or file has, by the option that names them."""
    if path.is_dir():
        return {name: str(path) for name, (folder, _) in _OWN.items() if (path / folder).is_dir()}
    if path.suffix not in (".safetensors", ".sft"):
        return {}
    names = read_header(path).tensors
    return {name: str(path) for name, (_, prefix) in _OWN.items() if any(n.startswith(prefix) for n in names)}
