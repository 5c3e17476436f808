"""The command line of ``sd3_minimal_inference.py``: one field per published flag, and a few more."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any

from library.config.fields import option
from library.errors import UserError
from library.inference.minimal_options import LoraWeightsOptions, check_common


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


@dataclass(frozen=True)
class SD3PrecisionOptions:
    """Precision and memory."""

    fp16: bool = option(False, "weights and computation in float16; default is float32")
    bf16: bool = option(False, "the same in bfloat16")
    offload: bool = option(False, "keep only the part in use on the device, and free it afterwards")

    @property
    def dtype(self) -> str:
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


GROUPS = (SD3FilesOptions, SD3ImageOptions, LoraWeightsOptions, SD3PrecisionOptions)


@dataclass(frozen=True)
class SD3InferenceOptions:
    """All options of ``sd3_minimal_inference.py``."""

    files: SD3FilesOptions
    image: SD3ImageOptions
    networks: LoraWeightsOptions
    precision: SD3PrecisionOptions

    @staticmethod
    def from_args(args: argparse.Namespace) -> SD3InferenceOptions:
        """Read the options from a namespace; missing attributes have their defaults."""

        def group(options: type) -> Any:
            return options(**{f.name: getattr(args, f.name, f.default) for f in fields(options)})

        return SD3InferenceOptions(*(group(options) for options in GROUPS))


def check_options(options: SD3InferenceOptions) -> None:
    """Refuse what cannot work, all findings at once, before torch is loaded.

    Raises:
        UserError: one line per finding.
    """
    findings = list(check_common(options.image, options.networks))
    if options.precision.fp16 and options.precision.bf16:
        findings.append("--fp16 and --bf16 exclude each other; leave one out")
    if options.files.t5xxl_token_length < 1:
        findings.append(f"--t5xxl_token_length {options.files.t5xxl_token_length}: must be at least 1")
    if findings:
        raise UserError("\n".join(findings))
