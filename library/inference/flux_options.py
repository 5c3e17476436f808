"""The command line of ``flux_minimal_inference.py``: one field per published flag, and the tokenizers' folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from library.config.fields import option
from library.errors import UserError
from library.inference.minimal_options import SIZE_STEP, LoraWeightsOptions, check_common
from library.inference.part_dtypes import PartDtype, read_part_dtypes

__all__ = ["SIZE_STEP"]


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


GROUPS = (FluxFilesOptions, FluxImageOptions, LoraWeightsOptions, FluxPrecisionOptions)


@dataclass(frozen=True)
class FluxInferenceOptions:
    """All options of ``flux_minimal_inference.py``."""

    files: FluxFilesOptions
    image: FluxImageOptions
    networks: LoraWeightsOptions
    precision: FluxPrecisionOptions

    @staticmethod
    def from_args(args: argparse.Namespace) -> FluxInferenceOptions:
        """Read the options from a namespace; missing attributes have their defaults."""

        def group(options: type) -> Any:
            return options(**{f.name: getattr(args, f.name, f.default) for f in fields(options)})

        return FluxInferenceOptions(*(group(options) for options in GROUPS))


def part_dtypes(options: FluxPrecisionOptions) -> dict[str, PartDtype]:
    """Return the dtypes of ``clip_l``, ``t5xxl``, ``flux`` and ``ae``. Raises UserError: see ``read_part_dtypes``."""
    given = {part: getattr(options, f"{part}_dtype") for part in ("clip_l", "t5xxl", "flux", "ae")}
    return read_part_dtypes(options.dtype, given, without_fp8=("ae",), example="flux")


def check_options(options: FluxInferenceOptions) -> None:
    """Refuse what cannot work, all findings at once, before torch is loaded.

    Raises:
        UserError: one line per finding.
    """
    findings = [*_image(options.image), *_dtypes(options.precision), *check_common(options.image, options.networks)]
    if findings:
        raise UserError("\n".join(findings))


def _image(image: FluxImageOptions) -> Iterator[str]:
    if not 0 <= image.guidance < float("inf"):
        yield f"--guidance {image.guidance:g}: must be at least 0"


def _dtypes(precision: FluxPrecisionOptions) -> Iterator[str]:
    try:
        part_dtypes(precision)
    except UserError as error:
        yield str(error)
