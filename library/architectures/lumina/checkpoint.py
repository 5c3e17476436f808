"""Find and recognize all parts of Lumina-Image 2.0 from headers, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.architectures.base import ModelInfo
from library.architectures.common import ae
from library.architectures.common.checkpoint import MODEL_FLAG, check_pipeline, locate_model, locate_part
from library.architectures.common.key_map import KeyMap, TensorLayout
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import refuse_other, refuse_scaled, unknown
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import is_shard
from library.architectures.common.sources import in_file
from library.architectures.common.tensor_files import TensorFile, WeightFile
from library.architectures.common.tokenizer_files import GEMMA, locate_tokenizer
from library.architectures.lumina import gemma2
from library.architectures.lumina.adapters import RECORD
from library.architectures.lumina.names import (
    SIGN,
    file_prefix,
    in_diffusers_layout,
    open_diffusers_transformer,
)
from library.architectures.lumina.options import LuminaOptions
from library.architectures.lumina.sizes import NextDiTSizes, infer_sizes
from library.errors import UserError, naming
from library.files.safetensors_io import read_header

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
#: the transformer's own names
TOP = (
    "x_embedder", "noise_refiner", "context_refiner", "t_embedder", "cap_embedder", "layers", "norm_final",
    "final_layer",
)  # fmt: skip
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
        transformer = _transformer_source(path)
        own = _own_parts(path)
    parts = {name: getattr(options, name) or own.get(name) for name in _OWN}
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


# ---- the transformer ----


def _transformer_source(path: Path) -> ModelSource:
    if path.is_dir():
        check_pipeline(path, "lumina")
        inner = path / "transformer"
        return _described(open_diffusers_transformer(inner if inner.is_dir() else path), "")
    if is_shard(path):
        return _described(open_diffusers_transformer(path), "")
    file = with_plain_numbers(TensorFile.open(path))
    refuse_other(path, file.shapes.keys(), "lumina")
    if in_diffusers_layout(file.shapes):
        return _described(open_diffusers_transformer(path), "")
    if not any(name.endswith(SIGN) for name in file.shapes):
        raise unknown(path, file.shapes.keys(), "Lumina-Image 2.0 transformer")
    return _described(file, file_prefix(file.shapes))


def _described(file: WeightFile, prefix: str) -> ModelSource:
    shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}

    def described(_: WeightFile) -> ModelSource:
        refuse_scaled(shapes)
        return ModelSource("transformer", file, published_layout(prefix), {"sizes": infer_sizes(shapes)})

    return in_file(file.path, described, file)


def published_layout(prefix: str = "") -> TensorLayout:
    """Return the published layout; the model's own names are the published ones."""
    return TensorLayout(KeyMap((name, name) for name in TOP), prefix)
