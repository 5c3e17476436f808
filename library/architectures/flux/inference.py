"""``flux_minimal_inference.py``: one field per published flag and the tokenizers' folder, and how they open a model.

This file imports torch and models within functions only, because ``--help`` reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from library.architectures.minimal_inference import (
    LoraWeightsOptions,
    MinimalInference,
    ModelPart,
    OpenedModel,
    usual_request,
)
from library.config.fields import option
from library.errors import UserError
from library.memory.part_dtypes import PartDtype, read_part_dtypes

if TYPE_CHECKING:
    from library.architectures.flux.family import Flux
    from library.architectures.flux.inspection import FluxCheckpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FluxFilesOptions:
    """Model."""

    ckpt_path: str | None = option(
        None,
        "transformer of FLUX.1 or Chroma: a .safetensors file, a Diffusers folder, or a Hub id",
        aliases=("--ckpt",),
        required=True,
    )
    model_type: str = option("flux", "kind of the model: FLUX.1, or Chroma", choices=["flux", "chroma"])
    clip_l: str | None = option(None, "CLIP-L text encoder, a .safetensors file; not for Chroma")
    t5xxl: str | None = option(None, "T5-XXL text encoder, a .safetensors file")
    ae: str | None = option(None, "autoencoder: a .safetensors file, a Diffusers folder, or a Hub id")
    tokenizer_cache_dir: str | None = option(None, "folder that holds the tokenizers, for use without network")
    apply_t5_attn_mask: bool = option(
        False, "mask the padding tokens of prompts in T5-XXL and in the transformer; always on with Chroma"
    )


@dataclass(frozen=True)
class FluxImageOptions:
    """Images."""

    prompt: str = option("A photo of a cat", "prompt")
    negative_prompt: str | None = option(None, "what to stay away from; for --cfg_scale other than 1")
    width: int = option(1360, "width in pixels, a multiple of 16", type=int)
    height: int = option(768, "height in pixels, a multiple of 16", type=int)
    steps: int | None = option(None, "sampling steps; default is 50, with FLUX.1 schnell 4", type=int)
    guidance: float = option(3.5, "embedded guidance of FLUX.1 dev; schnell and Chroma have none", type=float)
    cfg_scale: float = option(1.0, "classifier-free guidance scale; 1 for none, which takes half the time", type=float)
    seed: int | None = option(None, "seed; random if not given, and shown", type=int)
    output_dir: str = option(".", "folder for the images", aliases=("--out",))
    interactive: bool = option(False, "read prompts with options from the keyboard, a line each, until an empty one")


@dataclass(frozen=True)
class FluxPrecisionOptions:
    """Precision and memory."""

    dtype: str = option(
        "bfloat16", "dtype of weights and computation: bfloat16 (bf16), float16 (fp16) or float32 (fp32)"
    )
    clip_l_dtype: str | None = option(None, "the same of CLIP-L; also fp8, where --dtype is computed in")
    ae_dtype: str | None = option(None, "the same of the autoencoder, without fp8")
    t5xxl_dtype: str | None = option(None, "the same of T5-XXL; also fp8")
    flux_dtype: str | None = option(None, "the same of the transformer; also fp8")
    offload: bool = option(False, "keep only the part in use on the device, and free it afterwards")


def part_dtypes(options: FluxPrecisionOptions) -> dict[str, PartDtype]:
    """Return the dtypes of ``clip_l``, ``t5xxl``, ``flux`` and ``ae``. Raises UserError: see ``read_part_dtypes``."""
    given = {part: getattr(options, f"{part}_dtype") for part in ("clip_l", "t5xxl", "flux", "ae")}
    return read_part_dtypes(options.dtype, given, without_fp8=("ae",), example="flux")


def _findings(options: Any) -> Iterator[str]:
    if not 0 <= options.image.guidance < float("inf"):
        yield f"--guidance {options.image.guidance:g}: must be at least 0"
    try:
        part_dtypes(options.precision)
    except UserError as error:
        yield str(error)


def _open(options: Any) -> OpenedModel:
    from library.architectures.flux.options import FluxModelOptions

    files, image = options.files, options.image
    checkpoint, family = _inspect(files)
    if len(checkpoint.text_encoders) == 1:
        for name, value in (("clip_l", files.clip_l), ("clip_l_dtype", options.precision.clip_l_dtype)):
            if value:
                logger.warning("--%s has no effect with %s", name, checkpoint.info.description)
    if not family.takes_guidance and image.guidance not in (FluxImageOptions.guidance, 0.0):
        logger.warning("--guidance %g has no effect with %s", image.guidance, checkpoint.info.description)
    parts = {name: ModelPart(name, dtype) for name, dtype in part_dtypes(options.precision).items()}
    return OpenedModel(
        # the command line's guidance comes with each image, if the model takes one
        family=family.changed(FluxModelOptions, guidance_scale=family.sample_defaults.get("guidance_scale", 0.0)),
        checkpoint=checkpoint,
        encoders=[parts[name] for name in ("clip_l", "t5xxl")[-len(checkpoint.text_encoders) :]],
        denoiser=parts["flux"],
        vae=parts["ae"],
        settings={
            "steps": family.sampling_steps,
            "guidance_scale": image.guidance if family.takes_guidance else None,
        },
    )


def _inspect(given: FluxFilesOptions) -> tuple[FluxCheckpoint, Flux]:
    from library.architectures.flux.family import FLUX
    from library.architectures.flux.options import FluxModelOptions

    family = FLUX.changed(
        FluxModelOptions,
        model_type=given.model_type,
        clip_l=given.clip_l,
        t5xxl=given.t5xxl,
        ae=given.ae,
        apply_t5_attn_mask=given.apply_t5_attn_mask,
    )
    checkpoint = family.inspect(given.ckpt_path or "", tokenizer_cache_dir=given.tokenizer_cache_dir)
    return checkpoint, family.for_model(checkpoint)


_FLAGS = {"scale": "cfg_scale"}
INFERENCE = MinimalInference(
    groups={
        "files": FluxFilesOptions,
        "image": FluxImageOptions,
        "networks": LoraWeightsOptions,
        "precision": FluxPrecisionOptions,
    },
    request=partial(usual_request, flags=_FLAGS),
    open=_open,
    findings=_findings,
    flags=_FLAGS,
)
