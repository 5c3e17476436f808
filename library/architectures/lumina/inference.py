"""``lumina_minimal_inference.py``: one field per published flag and a few more, and how they open a model.

This file imports torch and models within functions only, because ``--help`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from library.architectures.minimal_inference import (
    ImageRequest,
    LoraWeightsOptions,
    MinimalInference,
    ModelPart,
    OpenedModel,
    usual_request,
)
from library.config import prompt_options as read
from library.config.attention import missing_package
from library.config.fields import option
from library.config.prompt_options import PromptOption
from library.errors import UserError
from library.memory.part_dtypes import PartDtype, read_part_dtypes

_FLAGS = {"width": "image_width", "height": "image_height", "scale": "guidance_scale"}
#: flag of an attention -> the implementation
_ATTENTION = {"use_flash_attn": "flash", "use_sage_attn": "sageattn"}


@dataclass(frozen=True)
class LuminaFilesOptions:
    """Model."""

    pretrained_model_name_or_path: str | None = option(
        None, "Lumina-Image 2.0: a .safetensors file, a Diffusers folder, or a Hub id", required=True
    )
    gemma2_path: str | None = option(None, "Gemma2 2B text encoder; default is the model's own")
    ae_path: str | None = option(None, "autoencoder of FLUX.1; default is the model's own")
    tokenizer_cache_dir: str | None = option(None, "folder that holds the tokenizer, for use without network")
    gemma2_max_token_length: int = option(
        256, "tokens of a prompt, the system prompt's included", type=int, unit="tokens", minimum=1
    )


@dataclass(frozen=True)
class LuminaImageOptions:
    """Images."""

    prompt: str = option("A beautiful sunset over the mountains", "prompt")
    negative_prompt: str = option("", "what to stay away from")
    system_prompt: str = option("", "text before the prompt, followed by <Prompt Start>")
    add_system_prompt_to_negative_prompt: bool = option(False, "put it before the negative prompt, too")
    image_width: int = option(1024, "width in pixels, a multiple of 16", type=int)
    image_height: int = option(1024, "height in pixels, a multiple of 16", type=int)
    steps: int = option(36, "sampling steps", type=int)
    guidance_scale: float = option(3.5, "classifier-free guidance scale; 1 for none", type=float)
    cfg_trunc_ratio: float = option(
        0.25, "how far to the image guidance is used, 0 to 1; the steps after that take half the time", type=float
    )
    renorm_cfg: float = option(
        1.0, "largest norm of a guided prediction, as a multiple of that with the prompt alone; 0 for no limit",
        type=float,
    )  # fmt: skip
    discrete_flow_shift: float = option(
        6.0, "shift of the noise levels; above 1 spends more steps on noise", type=float
    )
    seed: int | None = option(None, "seed; random if not given, and shown", type=int)
    output_dir: str = option("outputs", "folder for the images")
    interactive: bool = option(False, "read prompts with options from the keyboard, a line each, until an empty one")


@dataclass(frozen=True)
class LuminaPrecisionOptions:
    """Precision and memory."""

    dtype: str = option("bf16", "dtype of weights and computation: bfloat16 (bf16), float16 (fp16) or float32 (fp32)")
    gemma2_dtype: str = option("bf16", "the same of Gemma2; also fp8, where --dtype is computed in")
    ae_dtype: str = option("bf16", "the same of the autoencoder, without fp8")
    device: str | None = option(None, "device, such as cpu or cuda:1 (default: the GPU, if there is one)")
    offload: bool = option(False, "keep only the part in use on the device, and free it afterwards")
    use_flash_attn: bool = option(False, "use the attention of the package flash-attn")
    use_sage_attn: bool = option(False, "use the attention of the package sageattention")


def part_dtypes(options: LuminaPrecisionOptions) -> dict[str, PartDtype]:
    """Return the dtypes of ``gemma2``, ``lumina`` and ``ae``. Raises UserError: see ``read_part_dtypes``."""
    given = {"gemma2": options.gemma2_dtype, "lumina": None, "ae": options.ae_dtype}
    return read_part_dtypes(options.dtype, given, without_fp8=("ae",), example="gemma2")


def _findings(options: Any) -> Iterator[str]:
    image, precision = options.image, options.precision
    if not 0 <= image.cfg_trunc_ratio <= 1:
        yield f"--cfg_trunc_ratio {image.cfg_trunc_ratio:g}: must be 0 to 1"
    if not 0 <= image.renorm_cfg < float("inf"):
        yield f"--renorm_cfg {image.renorm_cfg:g}: must be at least 0"
    if not 0 < image.discrete_flow_shift < float("inf"):
        yield f"--discrete_flow_shift {image.discrete_flow_shift:g}: must be above 0"
    if options.files.gemma2_max_token_length < 1:
        yield f"--gemma2_max_token_length {options.files.gemma2_max_token_length}: must be at least 1"
    if image.add_system_prompt_to_negative_prompt and not image.system_prompt:
        yield "--add_system_prompt_to_negative_prompt: there is none; give --system_prompt"
    if precision.use_flash_attn and precision.use_sage_attn:
        yield "--use_flash_attn and --use_sage_attn exclude each other; leave one out"
    for flag, mode in _ATTENTION.items():
        if getattr(precision, flag) and precision.dtype in ("fp32", "float", "float32"):
            yield f"--{flag}: works in half precision only; use --dtype bf16, or leave it out"
        if getattr(precision, flag) and (missing := missing_package(mode, f"--{flag}", otherwise=", or leave it out")):
            yield missing
    try:
        part_dtypes(precision)
    except UserError as error:
        yield str(error)


def _request(options: Any) -> ImageRequest:
    image = options.image
    made = usual_request(
        options,
        _FLAGS,
        flow_shift=image.discrete_flow_shift,
        cfg_trunc_ratio=image.cfg_trunc_ratio,
        renorm_cfg=image.renorm_cfg,
    )
    return replace(made, device=options.precision.device)


def _open(options: Any) -> OpenedModel:
    from library.architectures.lumina.family import LUMINA
    from library.architectures.lumina.options import LuminaOptions

    files, image, precision = options.files, options.image, options.precision
    family = LUMINA.changed(
        LuminaOptions,
        gemma2=files.gemma2_path,
        ae=files.ae_path,
        gemma2_max_token_length=files.gemma2_max_token_length,
        system_prompt=image.system_prompt,
    )
    try:
        checkpoint = family.inspect(
            files.pretrained_model_name_or_path or "", tokenizer_cache_dir=files.tokenizer_cache_dir
        )
    except UserError as error:
        text = str(error).replace("--gemma2", "--gemma2_path")
        raise UserError(text.replace("--ae", "--ae_path")) from None

    def prepare(name: str, module: Any) -> None:
        if name == "denoiser":
            named = (mode for flag, mode in _ATTENTION.items() if getattr(precision, flag))
            family.set_attention(module, next(named, "torch"))

    parts = {name: ModelPart(name, dtype) for name, dtype in part_dtypes(precision).items()}
    with_system = image.add_system_prompt_to_negative_prompt
    return OpenedModel(
        family=family.with_system_prompt_in_negative() if with_system else family,
        checkpoint=checkpoint,
        encoders=[parts["gemma2"]],
        denoiser=parts["lumina"],
        vae=parts["ae"],
        prepare=prepare,
    )


INFERENCE = MinimalInference(
    groups={
        "files": LuminaFilesOptions,
        "image": LuminaImageOptions,
        "networks": LoraWeightsOptions,
        "precision": LuminaPrecisionOptions,
    },
    request=_request,
    open=_open,
    findings=_findings,
    flags=_FLAGS,
    prompt_options=(PromptOption("g", "scale", read.number, "guidance_scale"),),
    model_flag="--pretrained_model_name_or_path",
)
