"""Finding all files of a FLUX.1 or Chroma model, from their headers, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.architectures.base import ModelInfo
from library.architectures.common import t5
from library.architectures.common.checkpoint import MODEL_FLAG
from library.architectures.common.loading import ModelSource
from library.architectures.common.tokenizer_files import T5, locate_tokenizer
from library.architectures.flux import checkpoint as files
from library.architectures.flux import vae
from library.architectures.flux.checkpoint import TransformerCheckpoint
from library.architectures.flux.controlnet import controlnet_source
from library.architectures.flux.options import CHROMA, FluxModelOptions
from library.architectures.flux.sizes import FluxSizes
from library.errors import UserError, did_you_mean, naming

#: Hub repository (and sub-folder) of CLIP-L's tokenizer
CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", None)
#: recorded as ss_base_model_version
VERSIONS = {files.DEV: "flux1", files.SCHNELL: "flux1", files.CHROMA: "chroma"}


@dataclass(frozen=True)
class FluxCheckpoint:
    """A recognised model: what it is and where its parts lie."""

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
    """See ``Architecture.inspect``."""
    is_chroma = options.model_type == CHROMA
    flags = ("t5xxl", "ae") if is_chroma else ("clip_l", "t5xxl", "ae")
    missing = [name for name in flags if not getattr(options, name)]
    if missing:
        raise UserError("\n".join(f"--{name}: {_NEEDED[name]}" for name in missing))
    with naming(MODEL_FLAG, path_or_id):
        transformer = files.inspect_transformer(path_or_id or "")
        files.check_model_type(options.model_type, transformer)
    encoders, folders = [], []
    if not is_chroma:
        path = _file(options.clip_l, "--clip_l")
        with naming("--clip_l", options.clip_l):
            encoders.append(files.clip_l_source(path))
        folders.append(locate_tokenizer((CLIP_TOKENIZER,), model_folder=path.parent, cache_dir=tokenizer_cache_dir))
    path = _file(options.t5xxl, "--t5xxl")
    with naming("--t5xxl", options.t5xxl):
        encoders.append(t5.t5_source(path))
    folders.append(
        locate_tokenizer(
            (t5.TOKENIZER,),
            model_folder=path.parent,
            cache_dir=tokenizer_cache_dir,
            subfolder="tokenizer_2",
            kind=T5,
        )
    )
    _check_widths(transformer, encoders, options)
    with naming("--ae", options.ae):
        autoencoder = vae.ae_source(options.ae or "")
    given = options.controlnet_model_name_or_path
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


def _file(given: str | None, flag: str) -> Path:
    """The file that an option names. Raises UserError where there is none."""
    path = Path(given or "").expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{flag} {given}: a folder; give a .safetensors file")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{flag} {given}: no such file{did_you_mean(path.name, siblings)}")


def _check_widths(transformer: TransformerCheckpoint, encoders: list[ModelSource], options: FluxModelOptions) -> None:
    """Refuse text encoders of other sizes than the transformer takes."""
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
