"""Options of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.config.declaration import Declaration, Facts, Finding, error, idle, warning
from library.config.fields import option


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "base model: a .safetensors or .ckpt file, a Diffusers folder, or a Hub id",
        harmless=True,
    )
    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, "the model predicts v (2.x at 768 pixels and its descendants)")
    tokenizer_cache_dir: str | None = option(
        None,
        "folder with tokenizer files, or a cache for those from the Hub, for offline use",
        harmless=True,
    )
    vae: str | None = option(
        None,
        "use this VAE instead of the model's: checkpoint, VAE file, Diffusers folder, or Hub id",
        harmless=True,
    )
    no_half_vae: bool = option(False, "keep the VAE in float32 under fp16 or bf16")
    clip_skip: int | None = option(
        None,
        "use the text encoder's n-th layer from the end (1 is the last)",
        type=int,
        neutral=(1,),
        unit="layers",
        minimum=1,
    )
    max_token_length: int | None = option(
        None,
        "tokens of a caption: 150 or 225 (75 if not given)",
        type=int,
        choices=[None, 150, 225],
        neutral=(75,),
        unit="tokens",
    )
    weighted_captions: bool = option(False, "read (word:1.2) and [word] in captions as emphasis")
    disable_mmap_load_safetensors: bool = option(
        False, "read the model into memory instead of mapping its file; faster on some network drives and in WSL"
    )

    @property
    def source(self) -> str:
        """Return the base model, which rules require."""
        assert self.pretrained_model_name_or_path
        return self.pretrained_model_name_or_path


# ---- what cannot work ----


def needs_model(o: Any, facts: Facts) -> Iterator[Finding]:
    if not o.model.pretrained_model_name_or_path:
        yield error("--pretrained_model_name_or_path: name the base model: a file, a Diffusers folder, or a Hub id")


def clip_skip(o: Any, facts: Facts) -> Iterator[Finding]:
    if o.model.v2 and o.model.clip_skip is not None:
        yield warning("--clip_skip is unusual with --v2, which uses the last but one layer already")


# ---- what has no effect ----


@idle("no_half_vae", reason="without --mixed_precision fp16 or bf16: the VAE is in float32 anyway")
def vae_in_float32_anyway(o: Any) -> bool:
    return o.training.mixed_precision == "no"


DECLARATION = Declaration(
    groups={"model": ModelOptions},
    rules=(
        needs_model,
        clip_skip,
    ),
    idle=(vae_in_float32_anyway,),
)
