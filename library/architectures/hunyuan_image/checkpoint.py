"""Find and recognize all parts of HunyuanImage-2.1 from headers, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.architectures.common import t5
from library.architectures.common.checkpoint import MODEL_FLAG, locate_model, locate_part
from library.architectures.common.loading import ModelSource
from library.architectures.common.tensor_files import Shapes
from library.architectures.common.tokenizer_files import QWEN, locate_tokenizer
from library.architectures.hunyuan_image import qwen
from library.architectures.hunyuan_image.names import DISTILLED, LAYOUTS
from library.architectures.hunyuan_image.options import HunyuanOptions
from library.architectures.hunyuan_image.sizes import HunyuanSizes, infer_sizes
from library.architectures.hunyuan_image.vae import vae_source
from library.architectures.model_info import ModelInfo
from library.errors import UserError, naming

VERSION = "hunyuan-image-2.1"
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer")
#: option -> (folder of a pipeline, the published file)
FILES = {
    "text_encoder": ("text_encoder", "qwen_2.5_vl_7b.safetensors"),
    "byt5": ("text_encoder_2", "byt5_small_glyphxl_fp16.safetensors"),
    "vae": ("vae", "hunyuan_image_2.1_vae_fp16.safetensors"),
}


@dataclass(frozen=True)
class HunyuanCheckpoint:
    """A recognized model: its sizes, and the places of its parts."""

    info: ModelInfo
    path: str
    sizes: HunyuanSizes
    transformer: ModelSource
    text_encoders: tuple[ModelSource, ...]  # Qwen2.5-VL, byT5
    vae: ModelSource
    tokenizer_folder: Path  # of Qwen2.5-VL; byT5 reads bytes


def inspect_model(
    path_or_id: str | None, options: HunyuanOptions, *, vae: str | None, tokenizer_cache_dir: str | None
) -> HunyuanCheckpoint:
    """Find and recognize the model; see ``Architecture.inspect``."""
    path = locate_model(path_or_id or "", COMPONENTS)
    with naming(MODEL_FLAG, path_or_id):
        transformer = transformer_source(path)
    places = _places(path, {"text_encoder": options.text_encoder, "byt5": options.byt5, "vae": vae})
    with naming("--text_encoder", options.text_encoder):
        conversation = qwen.qwen_source(places["text_encoder"])
    with naming("--byt5", options.byt5):
        glyphs = t5.t5_source(places["byt5"], flag="--byt5", example="byt5_small_glyphxl_fp16.safetensors")
    with naming("--vae", vae):
        autoencoder = vae_source(str(places["vae"]))
    sizes = transformer.config["sizes"]
    _check_widths(sizes, conversation, glyphs)
    return HunyuanCheckpoint(
        info=ModelInfo(family="hunyuan_image", version=VERSION, description="HunyuanImage-2.1"),
        path=str(path),
        sizes=sizes,
        transformer=transformer,
        text_encoders=(conversation, glyphs),
        vae=autoencoder,
        tokenizer_folder=locate_tokenizer(
            (qwen.TOKENIZER,),
            model_folder=path if path.is_dir() else path.parent,
            cache_dir=tokenizer_cache_dir,
            kind=QWEN,
        ),
    )


def transformer_source(path: Path) -> ModelSource:
    """Return the transformer of a file in the published or in diffusers' layout, of shards, or of a folder.

    Raises:
        UserError: something else, or a distilled model.
    """
    return LAYOUTS.source(path, infer_sizes, _refuse_distilled)


def _refuse_distilled(path: Path, shapes: Shapes) -> None:
    published = tuple(f"{LAYOUTS.prefix(shapes)}{module}." for module in DISTILLED)
    theirs = ("guidance_embedder", "timestep_embedder_r")
    if any(name.startswith(published) or any(part in name for part in theirs) for name in shapes):
        raise UserError(
            f"{path} is the distilled HunyuanImage-2.1, which is made for few steps and is not trained; give the base "
            "model, hunyuanimage2.1.safetensors"
        )


def _places(path: Path, given: dict[str, str | None]) -> dict[str, Path]:
    """Return the places of the other parts: named by options, else folders of the pipeline.

    Raises:
        UserError: one is missing.
    """
    found, problems = {}, []
    for name, (folder, file) in FILES.items():
        value = given[name]
        if value:
            # the VAE may be a Hub id, which its own reader finds
            found[name] = Path(value) if name == "vae" else locate_part(value, f"--{name}", folder)
        elif path.is_dir() and (path / folder).is_dir():
            found[name] = path / folder
        else:
            problems.append(f"--{name} is required: name {file}")
    if problems:
        raise UserError("\n".join(problems))
    return found


def _check_widths(sizes: HunyuanSizes, conversation: ModelSource, glyphs: ModelSource) -> None:
    """Refuse text encoders whose sizes do not fit the transformer."""
    for flag, source, width, expected in (
        ("--text_encoder", conversation, conversation.config["hidden_size"], sizes.context),
        ("--byt5", glyphs, glyphs.config["d_model"], sizes.glyphs),
    ):
        if width != expected:
            raise UserError(
                f"{flag} {source.file.path}: has states of width {width}, and the transformer takes {expected}; give "
                f"{FILES[flag[2:]][1]}"
            )
