"""``sd3_minimal_inference.py``: one field per published flag and a few more, and how they open a model.

This file imports torch and models within functions only, because ``--help`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from library.architectures.minimal_inference import (
    HalfPrecisionOptions,
    LoraWeightsOptions,
    MinimalInference,
    ModelPart,
    OpenedModel,
    one_half_precision,
    usual_request,
)
from library.config.fields import option
from library.memory.part_dtypes import read_part_dtypes

PARTS = ("clip_l", "clip_g", "t5xxl", "sd3", "vae")


@dataclass(frozen=True)
class SD3FilesOptions:
    """Model."""

    ckpt_path: str | None = option(
        None,
        "Stable Diffusion 3 or 3.5: a .safetensors file, a Diffusers folder, or a Hub id",
        aliases=("--ckpt",),
        required=True,
    )
    clip_g: str | None = option(None, "CLIP-G text encoder; default is the checkpoint's own")
    clip_l: str | None = option(None, "CLIP-L text encoder; default is the checkpoint's own")
    t5xxl: str | None = option(None, "T5-XXL text encoder; default is the checkpoint's own, or none if it has none")
    vae: str | None = option(None, "autoencoder; default is the checkpoint's own")
    tokenizer_cache_dir: str | None = option(None, "folder that holds the tokenizers, for use without network")
    t5xxl_token_length: int = option(256, "tokens of a prompt for T5-XXL", type=int)
    apply_lg_attn_mask: bool = option(False, "mask the padding tokens of prompts in CLIP-L and CLIP-G")
    apply_t5_attn_mask: bool = option(False, "mask the padding tokens of prompts in T5-XXL")


@dataclass(frozen=True)
class SD3ImageOptions:
    """Images."""

    prompt: str = option("A photo of a cat", "prompt")
    negative_prompt: str = option("", "what to stay away from")
    width: int = option(1024, "width in pixels, a multiple of 16", type=int)
    height: int = option(1024, "height in pixels, a multiple of 16", type=int)
    steps: int = option(50, "sampling steps", type=int)
    cfg_scale: float = option(5.0, "classifier-free guidance scale; 1 for none, which takes half the time", type=float)
    seed: int | None = option(1, "seed", type=int)
    output_dir: str = option(".", "folder for the images", aliases=("--out",))
    interactive: bool = option(False, "read prompts with options from the keyboard, a line each, until an empty one")


def _findings(options: Any) -> Iterator[str]:
    yield from one_half_precision(options)
    if options.files.t5xxl_token_length < 1:
        yield f"--t5xxl_token_length {options.files.t5xxl_token_length}: must be at least 1"


def _open(options: Any) -> OpenedModel:
    from library.architectures.sd3.family import SD3
    from library.architectures.sd3.options import SD3Options

    given = options.files
    family = SD3.changed(
        SD3Options,
        clip_l=given.clip_l,
        clip_g=given.clip_g,
        t5xxl=given.t5xxl,
        t5xxl_max_token_length=given.t5xxl_token_length,
        apply_lg_attn_mask=given.apply_lg_attn_mask,
        apply_t5_attn_mask=given.apply_t5_attn_mask,
    )
    checkpoint = family.inspect(given.ckpt_path or "", vae=given.vae, tokenizer_cache_dir=given.tokenizer_cache_dir)
    dtypes = read_part_dtypes(options.precision.dtype, dict.fromkeys(PARTS), without_fp8=("vae",), example="sd3")
    parts = {name: ModelPart(name, dtype) for name, dtype in dtypes.items()}
    return OpenedModel(
        family=family.for_model(checkpoint),
        checkpoint=checkpoint,
        encoders=[parts[name] for name in PARTS[: len(checkpoint.text_encoders)]],
        denoiser=parts["sd3"],
        vae=parts["vae"],
    )


_FLAGS = {"scale": "cfg_scale"}
INFERENCE = MinimalInference(
    groups={
        "files": SD3FilesOptions,
        "image": SD3ImageOptions,
        "networks": LoraWeightsOptions,
        "precision": HalfPrecisionOptions,
    },
    request=partial(usual_request, flags=_FLAGS),
    open=_open,
    findings=_findings,
    flags=_FLAGS,
    nan_remedy="leave --fp16 out, or give --bf16",
)
