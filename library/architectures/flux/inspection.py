"""Find all files of a FLUX.1 or Chroma model, from their headers, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.architectures.common import ae as vae
from library.architectures.common import t5
from library.architectures.common.checkpoint import MODEL_FLAG, locate_part
from library.architectures.common.loading import ModelSource
from library.architectures.common.tokenizer_files import T5, locate_tokenizer
from library.architectures.flux import checkpoint as files
from library.architectures.flux.checkpoint import TransformerCheckpoint
from library.architectures.flux.controlnet import controlnet_source
from library.architectures.flux.options import CHROMA, FluxModelOptions
from library.architectures.flux.sizes import FluxSizes
from library.architectures.model_info import ModelInfo
from library.errors import UserError, naming
from library.files.safetensors_io import is_pickle, read_header

#: Hub repository (and sub-folder) of CLIP-L's tokenizer
CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", None)
#: recorded as ss_base_model_version
VERSIONS = {files.DEV: "flux1", files.SCHNELL: "flux1", files.CHROMA: "chroma"}


@dataclass(frozen=True)
class FluxCheckpoint:
    """A recognized model: what it is and where its parts are."""

    info: ModelInfo
    path: str
    kind: str  # checkpoint.DEV, SCHNELL or CHROMA
    sizes: FluxSizes
    transformer: ModelSource
    text_encoders: tuple[ModelSource, ...]  # CLIP-L, T5; Chroma's is T5 alone
    vae: ModelSource
    tokenizer_folders: tuple[Path, ...]  # in the encoders' order
    controlnet: ModelSource | None = None

    @property
    def found(self) -> TransformerCheckpoint:
        return TransformerCheckpoint(self.kind, self.sizes, self.transformer)


def inspect_model(
    path_or_id: str | None, options: FluxModelOptions, *, tokenizer_cache_dir: str | None
) -> FluxCheckpoint:
    """Find and recognize the model; see ``Architecture.inspect``."""
    options = with_own_parts(path_or_id or "", options)
    is_chroma = options.model_type == CHROMA
    missing = [name for name in _parts_of(options) if not getattr(options, name)]
    if missing:
        raise UserError("\n".join(f"--{name}: {_NEEDED[name]}" for name in missing))
    with naming(MODEL_FLAG, path_or_id):
        transformer = files.inspect_transformer(path_or_id or "")
        files.check_model_type(options.model_type, transformer)
    encoders, folders = [], []
    if not is_chroma:
        path = locate_part(options.clip_l or "", "--clip_l", "text_encoder")
        with naming("--clip_l", options.clip_l):
            encoders.append(files.clip_l_source(path))
        folders.append(locate_tokenizer((CLIP_TOKENIZER,), model_folder=path.parent, cache_dir=tokenizer_cache_dir))
    path = locate_part(options.t5xxl or "", "--t5xxl", _t5_folder(options))
    with naming("--t5xxl", options.t5xxl):
        encoders.append(t5.t5_source(path))
    # a pipeline with one encoder has its tokenizer in "tokenizer"
    subfolder = "tokenizer" if path.name == "text_encoder" else "tokenizer_2"
    folders.append(
        locate_tokenizer(
            (t5.TOKENIZER,),
            model_folder=path.parent,
            cache_dir=tokenizer_cache_dir,
            subfolder=subfolder,
            kind=T5,
        )
    )
    _check_widths(transformer, encoders, options)
    with naming("--ae", options.ae):
        autoencoder = vae.ae_source(options.ae or "")
    given = getattr(options, "controlnet_model_name_or_path", None)  # not where ControlNets are trained
    info = ModelInfo(family="flux", version=VERSIONS[transformer.kind], description=transformer.title)
    return FluxCheckpoint(
        info=info,
        path=str(transformer.source.file.path),
        kind=transformer.kind,
        sizes=transformer.sizes,
        transformer=transformer.source,
        text_encoders=tuple(encoders),
        vae=autoencoder,
        tokenizer_folders=tuple(folders),
        controlnet=controlnet_source(given, transformer.sizes) if given else None,
    )


_NEEDED = {
    "clip_l": "name the CLIP-L text encoder, clip_l.safetensors (Chroma has none: --model_type chroma)",
    "t5xxl": "name the T5-XXL text encoder, t5xxl_fp16.safetensors or the like",
    "ae": "name the autoencoder, ae.safetensors of FLUX.1",
}


def _parts_of(options: FluxModelOptions) -> tuple[str, ...]:
    """Return the options that name the parts beside the transformer."""
    return ("t5xxl", "ae") if options.model_type == CHROMA else ("clip_l", "t5xxl", "ae")


def _t5_folder(options: FluxModelOptions) -> str:
    """Return the folder of T5 in a pipeline."""
    return "text_encoder" if options.model_type == CHROMA else "text_encoder_2"


def with_own_parts(path_or_id: str, options: FluxModelOptions) -> FluxModelOptions:
    """Fill in parts that are not named from the transformer's own pipeline folder or file, if it has them."""
    wanted = [name for name in _parts_of(options) if not getattr(options, name)]
    path = Path(path_or_id).expanduser()
    own: list[str] = []
    if (path / "model_index.json").is_file():
        subfolders = {"clip_l": "text_encoder", "t5xxl": _t5_folder(options), "ae": "vae"}
        own = [name for name in wanted if (path / subfolders[name]).is_dir()]
    elif wanted and path.suffix in (".safetensors", ".sft") and path.is_file():
        prefixes = {"clip_l": files.BUNDLED_CLIP_L, "t5xxl": t5.BUNDLED, "ae": "vae."}
        with naming(MODEL_FLAG, path_or_id):
            names = read_header(path).tensors
        own = [part for part in wanted if any(name.startswith(prefixes[part]) for name in names)]
    named: dict[str, Any] = dict.fromkeys(own, str(path))
    return replace(options, **named)


def _check_widths(transformer: TransformerCheckpoint, encoders: list[ModelSource], options: FluxModelOptions) -> None:
    """Refuse text encoders whose sizes do not fit the transformer."""
    width = encoders[-1].config["d_model"]
    if width != transformer.sizes.context:
        raise UserError(
            f"--t5xxl {options.t5xxl}: gives states of width {width}, the transformer takes "
            f"{transformer.sizes.context}; give T5-XXL"
        )
    if len(encoders) > 1 and (pooled := encoders[0].config["hidden_size"]) != transformer.sizes.pooled:
        raise UserError(
            f"--clip_l {options.clip_l}: gives text of width {pooled}, the transformer takes "
            f"{transformer.sizes.pooled}; give CLIP-L"
        )


def refuse_other_variant(adapter: Path, version: str) -> None:
    """Refuse an adapter whose metadata tell that it was made for the other of FLUX.1 and Chroma.

    Many of their modules have the same names and shapes, so that it would fit in part.

    Raises:
        UserError: naming the file and both models.
    """
    if not adapter.is_file() or is_pickle(adapter):
        return
    made_for = read_header(adapter).metadata.get("ss_base_model_version")
    if made_for != version and made_for in VERSIONS.values():
        raise UserError(f"{adapter}: made for {made_for}, and the model is {version}; give an adapter made for it")
