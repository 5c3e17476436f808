"""``hunyuan_image_minimal_inference.py``: one field per published flag and a few more, and how they open a model.

This file imports torch and models within functions only, because ``--help`` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.architectures.minimal_inference import ImageRequest, MinimalInference, ModelPart, OpenedModel
from library.config import prompt_options as read
from library.config.attention import missing_package
from library.config.fields import option
from library.config.prompt_options import PromptOption
from library.memory.part_dtypes import PartDtype

_OUTPUTS = {"images": ("image",), "latent": ("latent",), "latent_images": ("image", "latent")}


@dataclass(frozen=True)
class HunyuanFilesOptions:
    """Model."""

    dit: str | None = option(
        None, "HunyuanImage-2.1: a .safetensors file, a Diffusers folder, or a Hub id", required=True
    )
    vae: str | None = option(None, "VAE: a .safetensors file; default is that of a Diffusers folder")
    text_encoder: str | None = option(None, "text encoder Qwen2.5-VL 7B; default is that of a Diffusers folder")
    byt5: str | None = option(None, "text encoder byT5 for quoted text; default is that of a Diffusers folder")
    tokenizer_cache_dir: str | None = option(None, "folder that holds the tokenizer, for use without network")


@dataclass(frozen=True)
class HunyuanImagesOptions:
    """Images."""

    prompt: str | None = option(None, "prompt; text in double quotes appears in the image")
    from_file: str | None = option(None, "file of prompts with options, a line each")
    interactive: bool = option(False, "read prompts with options from the keyboard, a line each, until an empty one")
    latent_path: list[str] | tuple[str, ...] = option(
        (), "files of latents to decode, saved with --output_type latent", nargs="*"
    )
    negative_prompt: str = option("", "what to stay away from")
    image_size: list[int] | tuple[int, ...] = option(
        (2048, 2048), "height and width in pixels, multiples of 32", type=int, nargs=2
    )
    infer_steps: int = option(50, "sampling steps", type=int)
    guidance_scale: float = option(3.5, "classifier-free guidance scale of the first steps; 1 for none", type=float)
    apg_start_step_general: int = option(
        5,
        "last step, counted from 0, before projected guidance begins; at least the number of steps for none",
        type=int,
    )
    apg_start_step_ocr: int = option(38, "the same for prompts with quoted text", type=int)
    guidance_rescale: float = option(
        0.0, "how far a guided prediction gets the deviation of that with the prompt, 0 to 1, in the first steps",
        type=float,
    )  # fmt: skip
    guidance_rescale_apg: float = option(0.0, "the same in the steps of projected guidance", type=float)
    flow_shift: float = option(5.0, "shift of the noise levels; above 1 spends more steps on noise", type=float)
    seed: int | None = option(None, "seed; random if not given, and shown", type=int)
    save_path: str | None = option(None, "folder for the images, or for a single one a .png file", required=True)
    output_type: str = option("images", "what is saved", choices=list(_OUTPUTS))
    no_metadata: bool = option(False, "save images without their prompts and settings")


@dataclass(frozen=True)
class HunyuanNetworksOptions:
    """LoRA."""

    lora_weight: list[str] | tuple[str, ...] = option((), "LoRA files", nargs="*")
    lora_multiplier: list[float] | tuple[float, ...] = option(
        (1.0,), "their strengths, in their order; 1 for further files", type=float, nargs="*"
    )
    include_patterns: list[str] | tuple[str, ...] = option(
        (), "regular expressions; only tensors of the LoRA files whose names have a match of one are used", nargs="*"
    )
    exclude_patterns: list[str] | tuple[str, ...] = option((), "the same for tensors that are not used", nargs="*")
    save_merged_model: str | None = option(
        None, "save the transformer with the LoRA files merged into it here, and generate nothing"
    )
    lycoris: bool = option(False, "read the LoRA files with LyCORIS")
    merge_lora_weights: bool = option(
        False, "merge them into the model first: faster, but strengths cannot be changed by --m"
    )


@dataclass(frozen=True)
class HunyuanMemoryOptions:
    """Precision, memory and speed."""

    dtype: str = option(
        "bf16", "dtype of weights and computation: bf16, fp16 or fp32", choices=["bf16", "fp16", "fp32"]
    )
    fp8: bool = option(False, "keep the transformer in fp8, with a scale for each output channel")
    fp8_scaled: bool = option(False, "keep the transformer in fp8, with a scale for each 64 inputs of a channel")
    text_encoder_cpu: bool = option(False, "encode prompts on the CPU, whose memory is larger")
    vae_chunk_size: int | None = option(
        None, "rows that a convolution of the VAE computes at once; fewer take less memory (default: all)", type=int
    )
    vae_tiling: bool = option(
        False, "decode the image in tiles of 384 pixels, which takes the least memory; seams may show"
    )
    offload: bool = option(False, "keep only the part in use on the device, and free it afterwards")
    blocks_to_swap: int = option(0, "blocks of the transformer that wait in host memory until they run", type=int)
    attn_mode: str = option(
        "torch", "implementation of attention; sdpa is another name for torch",
        choices=["flash", "torch", "sageattn", "xformers", "sdpa"],
    )  # fmt: skip
    device: str | None = option(None, "device, such as cpu or cuda:1 (default: the GPU, if there is one)")


def _findings(options: Any) -> Iterator[str]:
    image, memory, networks = options.image, options.memory, options.networks
    if networks.lycoris:
        yield (
            "--lycoris: its LoHa, LoKr and other files are not read here; remove it for LoRA files, and merge others "
            "into the model with LyCORIS' own tools"
        )
    if networks.save_merged_model and not networks.lora_weight:
        yield "--save_merged_model: there is nothing to merge; give --lora_weight"
    if networks.save_merged_model and (memory.fp8 or memory.fp8_scaled or memory.blocks_to_swap):
        yield "--save_merged_model: not with --fp8, --fp8_scaled or --blocks_to_swap; the model is saved in --dtype"
    if (networks.include_patterns or networks.exclude_patterns) and not networks.lora_weight:
        yield "--include_patterns and --exclude_patterns choose tensors of LoRA files; give --lora_weight"
    for flag in ("include_patterns", "exclude_patterns"):
        for pattern in getattr(networks, flag):
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"--{flag} {pattern}: not a regular expression ({error})"
    sources = {
        "--prompt": bool(image.prompt), "--from_file": bool(image.from_file),
        "--interactive": image.interactive, "--latent_path": bool(image.latent_path),
    }  # fmt: skip
    given = [flag for flag, is_given in sources.items() if is_given]
    if not given and not networks.save_merged_model:
        yield f"one of {', '.join(sources)} is required"
    elif len(given) > 1 and given != ["--prompt", "--interactive"]:
        yield f"{' and '.join(given)} exclude each other: give one"
    for name in ("apg_start_step_general", "apg_start_step_ocr"):
        if getattr(image, name) < 0:
            yield f"--{name} {getattr(image, name)}: must be at least 0"
    for name in ("guidance_rescale", "guidance_rescale_apg"):
        if not 0 <= getattr(image, name) <= 1:
            yield f"--{name} {getattr(image, name):g}: must be 0 to 1"
    if not 0 < image.flow_shift < float("inf"):
        yield f"--flow_shift {image.flow_shift:g}: must be above 0"
    if len(networks.lora_multiplier) > max(1, len(networks.lora_weight)):
        yield (
            f"--lora_multiplier: {len(networks.lora_multiplier)} strengths for {len(networks.lora_weight)} files of "
            "--lora_weight"
        )
    if memory.vae_chunk_size is not None and memory.vae_chunk_size < 1:
        yield f"--vae_chunk_size {memory.vae_chunk_size}: must be at least 1"
    if memory.blocks_to_swap < 0:
        yield f"--blocks_to_swap {memory.blocks_to_swap}: must be at least 0"
    if missing := missing_package(memory.attn_mode, f"--attn_mode {memory.attn_mode}", otherwise=""):
        yield missing
    save = Path(image.save_path or "")
    if save.suffix.lower() == ".png" and (image.from_file or image.interactive or len(image.latent_path) > 1):
        yield f"--save_path {save}: names one image, and there may be several; give a folder"


def _request(options: Any) -> ImageRequest:
    image, networks = options.image, options.networks
    save = Path(image.save_path or "")
    is_file = save.suffix.lower() == ".png"
    height, width = image.image_size
    strengths = [*networks.lora_multiplier, *[1.0] * len(networks.lora_weight)]
    return ImageRequest(
        prompt=image.prompt or "",
        interactive=image.interactive,
        prompt_file=image.from_file,
        latent_files=image.latent_path,
        output_dir=str(save.parent if is_file else save),
        image_file=save.name if is_file else None,
        saves=_OUTPUTS[image.output_type],
        with_metadata=not image.no_metadata,
        seed=image.seed,
        settings={
            "negative_prompt": image.negative_prompt,
            "width": width,
            "height": height,
            "steps": image.infer_steps,
            "scale": image.guidance_scale,
            "flow_shift": image.flow_shift,
            "own": {
                name: getattr(image, name)
                for name in (
                    "apg_start_step_general", "apg_start_step_ocr", "guidance_rescale", "guidance_rescale_apg"
                )
            },
        },
        lora_weights=[f"{path};{strength}" for path, strength in zip(networks.lora_weight, strengths, strict=False)],
        merge_lora_weights=networks.merge_lora_weights,
        offload=options.memory.offload,
        blocks_to_swap=options.memory.blocks_to_swap,
        lora_patterns=(networks.include_patterns, networks.exclude_patterns),
        merged_file=networks.save_merged_model,
        device=options.memory.device,
    )  # fmt: skip


def _open(options: Any) -> OpenedModel:
    from library.architectures.hunyuan_image.family import HUNYUAN_IMAGE
    from library.architectures.hunyuan_image.options import HunyuanOptions
    from library.files.precisions import COMPUTE

    files, memory = options.files, options.memory
    family = HUNYUAN_IMAGE.changed(
        HunyuanOptions,
        text_encoder=files.text_encoder,
        byt5=files.byt5,
        text_encoder_cpu=memory.text_encoder_cpu,
        vae_chunk_size=memory.vae_chunk_size,
    )
    checkpoint = family.inspect(files.dit or "", vae=files.vae, tokenizer_cache_dir=files.tokenizer_cache_dir)

    def prepare(name: str, module: Any) -> None:
        if name == "denoiser":
            family.set_attention(module, "torch" if memory.attn_mode == "sdpa" else memory.attn_mode)
        if name == "vae" and memory.vae_tiling:
            module.enable_tiling()

    compute = COMPUTE[memory.dtype]
    in_fp8 = memory.fp8 or memory.fp8_scaled
    return OpenedModel(
        family=family,
        checkpoint=checkpoint,
        encoders=[ModelPart("text_encoder", PartDtype(compute)), ModelPart("byt5", PartDtype(compute))],
        denoiser=ModelPart("dit", PartDtype(compute, in_fp8), "fp8_scaled" if memory.fp8_scaled else "fp8"),
        vae=ModelPart("vae", PartDtype(compute)),
        encodes_on_host=memory.text_encoder_cpu,
        prepare=prepare,
    )


INFERENCE = MinimalInference(
    groups={
        "files": HunyuanFilesOptions,
        "image": HunyuanImagesOptions,
        "networks": HunyuanNetworksOptions,
        "memory": HunyuanMemoryOptions,
    },
    request=_request,
    open=_open,
    findings=_findings,
    flags={
        "width": "image_size", "height": "image_size", "scale": "guidance_scale", "steps": "infer_steps",
        "output_dir": "save_path", "merged_file": "save_merged_model",
    },
    prompt_options=(
        PromptOption("g", "scale", read.number, "guidance_scale"),
        PromptOption("l", "scale", read.number),
    ),
    size_step=32,
    model_flag="--dit",
    lora_flag="--lora_weight",
    nan_remedy="try --dtype bfloat16",
)  # fmt: skip
