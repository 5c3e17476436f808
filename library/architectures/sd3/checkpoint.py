"""Find and recognize all parts of Stable Diffusion 3 and 3.5 from headers, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.architectures.common import clip, t5
from library.architectures.common.checkpoint import MODEL_FLAG, locate_model, locate_part, vae_at
from library.architectures.common.loading import ModelSource
from library.architectures.common.recognise import what_it_is
from library.architectures.common.scaled_file import with_plain_numbers
from library.architectures.common.sharded_file import open_weights
from library.architectures.common.sources import diffusers_vae_source, in_file, vae_source
from library.architectures.common.tensor_files import TensorFile, WeightFile
from library.architectures.common.tokenizer_files import T5, locate_tokenizer
from library.architectures.model_info import ModelInfo
from library.architectures.sd3.names import LAYOUTS
from library.architectures.sd3.options import SD3Options
from library.architectures.sd3.sizes import MMDiTSizes, infer_sizes
from library.errors import UserError, naming

COMPONENTS = (
    "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
)  # fmt: skip
CHANNELS = 16
#: Hub repositories (and sub-folder) of the tokenizers
CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", None)
OPENCLIP_TOKENIZER = ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", None)
#: prefix of the names of text encoders in files of a whole model
BUNDLED = {"clip_l": "text_encoders.clip_l.", "clip_g": "text_encoders.clip_g."}
TITLES = {"medium": "Stable Diffusion 3 medium", "5-medium": "Stable Diffusion 3.5 medium"}


@dataclass(frozen=True)
class SD3Checkpoint:
    """A recognized model: its kind, and the places of its parts."""

    info: ModelInfo
    path: str
    sizes: MMDiTSizes
    transformer: ModelSource
    text_encoders: tuple[ModelSource, ...]  # CLIP-L, CLIP-G and, if there is one, T5
    vae: ModelSource
    tokenizer_folders: tuple[Path, ...]  # in the encoders' order

    @property
    def has_t5(self) -> bool:
        return len(self.text_encoders) > 2


def inspect_model(
    path_or_id: str | None, options: SD3Options, *, vae: str | None, tokenizer_cache_dir: str | None
) -> SD3Checkpoint:
    """Find and recognize the model; see ``Architecture.inspect``."""
    path = locate_model(path_or_id or "", COMPONENTS)
    with naming(MODEL_FLAG, path_or_id):
        transformer = LAYOUTS.source(path, infer_sizes)
    sizes = transformer.config["sizes"]
    encoders = _text_encoders(path, options)
    _check_widths(sizes, encoders, path)
    title = TITLES.get(sizes.version, "Stable Diffusion 3.5 large")
    reading = "" if "t5xxl" in encoders else ", without T5-XXL"
    return SD3Checkpoint(
        info=ModelInfo(family="sd3", version=sizes.version, description=title + reading),
        path=str(path),
        sizes=sizes,
        transformer=transformer,
        text_encoders=tuple(encoders.values()),
        vae=_vae(path, vae),
        tokenizer_folders=_tokenizers(path, with_t5="t5xxl" in encoders, cache_dir=tokenizer_cache_dir),
    )


# ---- text encoders ----


def _text_encoders(path: Path, options: SD3Options) -> dict[str, ModelSource]:
    """Return the sources of CLIP-L, CLIP-G and T5: named by options, else the model's own.

    Raises:
        UserError: CLIP-L or CLIP-G is missing, or a file that an option names is something else.
    """

    def opened(place: Path) -> WeightFile:
        return with_plain_numbers(open_weights(place))

    found: dict[str, ModelSource] = {}
    subfolders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    own = None if path.is_dir() else with_plain_numbers(TensorFile.open(path))
    for name, subfolder in subfolders.items():
        given = getattr(options, name)
        if given:
            with naming(f"--{name}", given):
                place = locate_part(given, f"--{name}", subfolder)
                found[name] = t5.t5_source(place) if name == "t5xxl" else _clip_source(name, opened(place))
        elif own is None and (path / subfolder).is_dir():
            place = path / subfolder
            found[name] = t5.t5_source(place) if name == "t5xxl" else _clip_source(name, opened(place))
        elif own is not None and any(key.startswith(f"text_encoders.{name}.") for key in own.shapes):
            found[name] = t5.t5_source(path) if name == "t5xxl" else _clip_source(name, own)
    missing = [name for name in ("clip_l", "clip_g") if name not in found]
    if missing:
        raise UserError("\n".join(f"--{name}: {path} has none; name {name}.safetensors" for name in missing))
    return found


def _clip_source(name: str, file: WeightFile) -> ModelSource:
    """Return CLIP-L or CLIP-G with transformers' names, from its own file or from that of a whole model.

    Some programs leave out ``transformer.`` in the names of whole models, and CLIP-L's projection in all files.
    """
    roots = (f"{BUNDLED[name]}transformer.", BUNDLED[name], "")
    mark = "text_model.embeddings.token_embedding.weight"
    root = next((root for root in roots if root + mark in file.shapes), None)
    if root is None:
        what = what_it_is(file.shapes.keys(), "clip", mark)
        raise UserError(f"{file.path}: not a CLIP text encoder ({what}); give {name}.safetensors")
    activation = "quick_gelu" if name == "clip_l" else "gelu"
    config = in_file(
        file.path,
        lambda f: clip.infer_clip_config(f.shapes, prefix=root + clip.TEXT_MODEL, activation=activation),
        file,
    )
    title = "CLIP-L" if name == "clip_l" else "CLIP-G"
    projection = file.shapes.get(f"{root}{clip.PROJECTION}.weight")
    if projection is None:
        if name == "clip_g":
            raise UserError(f"{file.path}: {root}{clip.PROJECTION}.weight is missing; give clip_g.safetensors")
        # as in the published code: the identity instead
        return ModelSource(title, file, clip.clip_layout(prefix=root + clip.TEXT_MODEL), config)
    layout = clip.clip_layout(prefix=root, projection=True)
    return ModelSource(title, file, layout, {**config, "projection_dim": projection[0]})


def pooled_width(config: Mapping[str, Any]) -> int:
    """Return the number of features of the pooled output of CLIP-L or CLIP-G."""
    return config.get("projection_dim") or config["hidden_size"]


def _check_widths(sizes: MMDiTSizes, encoders: Mapping[str, ModelSource], path: Path) -> None:
    """Refuse text encoders whose sizes do not fit the transformer."""
    pooled = sum(pooled_width(encoders[name].config) for name in ("clip_l", "clip_g"))
    if pooled != sizes.pooled:
        raise UserError(
            f"{path}: the transformer takes pooled text of width {sizes.pooled}, CLIP-L and CLIP-G give {pooled} "
            "together; give --clip_l and --clip_g of Stable Diffusion 3"
        )
    states = sum(encoders[name].config["hidden_size"] for name in ("clip_l", "clip_g"))
    t5_width = encoders["t5xxl"].config["d_model"] if "t5xxl" in encoders else sizes.context
    if states > sizes.context or t5_width != sizes.context:
        raise UserError(
            f"{path}: the transformer takes states of width {sizes.context}, CLIP-L and CLIP-G give {states} together "
            f"and T5 {t5_width}; give the text encoders of Stable Diffusion 3"
        )


# ---- the rest ----


def _vae(path: Path, given: str | None) -> ModelSource:
    if given:
        source: ModelSource | None = vae_at(given)
    elif path.is_dir():
        source = diffusers_vae_source(path / "vae") if (path / "vae").is_dir() else None
    else:
        source = in_file(path, vae_source, TensorFile.open(path))
    if source is None:
        raise UserError(f"{path}: has no VAE; give one with --vae")
    if (channels := source.config["latent_channels"]) != CHANNELS:
        raise UserError(
            f"{source.file.path}: this VAE has {channels} latent channels, Stable Diffusion 3 needs {CHANNELS}; give "
            "another --vae"
        )
    return source


def _tokenizers(path: Path, *, with_t5: bool, cache_dir: str | None) -> tuple[Path, ...]:
    folder = path if path.is_dir() else path.parent
    first = locate_tokenizer((CLIP_TOKENIZER,), model_folder=folder, cache_dir=cache_dir)
    second = locate_tokenizer(
        (OPENCLIP_TOKENIZER, CLIP_TOKENIZER), model_folder=folder, cache_dir=cache_dir, subfolder="tokenizer_2"
    )
    if not with_t5:
        return first, second
    third = locate_tokenizer(
        (t5.TOKENIZER,), model_folder=folder, cache_dir=cache_dir, subfolder="tokenizer_3", kind=T5
    )
    return first, second, third
