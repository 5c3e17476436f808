"""``sdxl_minimal_inference.py``: one field per published flag and further ones, and how they open a model.

This file imports torch and models within functions only, because ``--help`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.architectures.minimal_inference import (
    HalfPrecisionOptions,
    ImageRequest,
    LoraWeightsOptions,
    MinimalInference,
    ModelPart,
    OpenedModel,
    one_half_precision,
    usual_request,
)
from library.architectures.sdxl.options import SECOND_PROMPT
from library.config.fields import option
from library.diffusion.samplers import SAMPLER_NAMES
from library.memory.part_dtypes import read_part_dtypes

PARTS = ("clip_l", "clip_g", "unet", "vae")


@dataclass(frozen=True)
class SDXLFilesOptions:
    """Model."""

    ckpt_path: str | None = option(
        None,
        "Stable Diffusion XL: a .safetensors or .ckpt file, a Diffusers folder, or a Hub id",
        aliases=("--ckpt",),
        required=True,
    )
    vae: str | None = option(None, "autoencoder; default is the checkpoint's own")
    tokenizer_cache_dir: str | None = option(None, "folder that holds the tokenizers, for use without network")
    v_parameterization: bool = option(False, "the model predicts v")


@dataclass(frozen=True)
class SDXLImageOptions:
    """Images."""

    prompt: str = option("A photo of a cat", "prompt")
    prompt2: str | None = option(None, "what the second text encoder, CLIP-G, reads; default is the prompt")
    negative_prompt: str = option("", "what to stay away from; both text encoders read it")
    width: int = option(1024, "width in pixels, a multiple of 8", type=int)
    height: int = option(1024, "height in pixels, a multiple of 8", type=int)
    sampler: str = option("euler", "sampler", choices=list(SAMPLER_NAMES))
    steps: int = option(50, "sampling steps", type=int)
    cfg_scale: float = option(7.0, "classifier-free guidance scale; 1 for none, which takes half the time", type=float)
    seed: int | None = option(None, "seed; random if not given, and shown", type=int)
    output_dir: str = option(".", "folder for the images", aliases=("--out",))
    interactive: bool = option(False, "read prompts with options from the keyboard, a line each, until an empty one")


@dataclass(frozen=True)
class SDXLPrecisionOptions(HalfPrecisionOptions):
    """Precision and memory."""

    fp16: bool = option(
        False, "weights and computation in float16, except for the autoencoder, which needs float32; default is float32"
    )
    bf16: bool = option(False, "weights and computation in bfloat16")


def _request(options: Any) -> ImageRequest:
    return usual_request(options, _FLAGS, sampler=options.image.sampler, prompt2=options.image.prompt2)


def _open(options: Any) -> OpenedModel:
    from library.architectures.sdxl.family import SDXL

    given, precision = options.files, options.precision
    checkpoint = SDXL.inspect(
        given.ckpt_path or "",
        v_parameterization=given.v_parameterization,
        vae=given.vae,
        tokenizer_cache_dir=given.tokenizer_cache_dir,
    )
    # values within the published autoencoder exceed the range of float16
    wanted = {**dict.fromkeys(PARTS), "vae": "float32" if precision.fp16 else None}
    dtypes = read_part_dtypes(precision.dtype, wanted, without_fp8=("vae",), example="unet")
    parts = {name: ModelPart(name, dtype) for name, dtype in dtypes.items()}
    return OpenedModel(
        family=SDXL,
        checkpoint=checkpoint,
        encoders=[parts["clip_l"], parts["clip_g"]],
        denoiser=parts["unet"],
        vae=parts["vae"],
    )


_FLAGS = {"scale": "cfg_scale"}
INFERENCE = MinimalInference(
    groups={
        "files": SDXLFilesOptions,
        "image": SDXLImageOptions,
        "networks": LoraWeightsOptions,
        "precision": SDXLPrecisionOptions,
    },
    request=_request,
    open=_open,
    findings=one_half_precision,
    flags=_FLAGS,
    prompt_options=(SECOND_PROMPT,),
    size_step=8,
    nan_remedy="leave --fp16 out, or give --bf16",
)
