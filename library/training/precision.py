"""Apply the options of precision: dtypes of frozen and trained weights, and the place of activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.config.arguments import ModelOptions, TrainingOptions
from library.config.declaration import message
from library.errors import NoEffect, UserError

if TYPE_CHECKING:
    from library.memory.compiling import CompileSettings


def vae_dtype(options: ModelOptions, frozen: torch.dtype) -> torch.dtype:
    """Return the VAE's dtype, where other frozen weights are in ``frozen``."""
    return torch.float32 if options.no_half_vae else frozen


def trained_dtype(options: TrainingOptions) -> torch.dtype:
    """Return the dtype of trained weights, their gradients and the optimizer's state."""
    return torch.bfloat16 if options.full_bf16 else torch.float16 if options.full_fp16 else torch.float32


def cast_trained(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network's parameters in place. Buffers, such as alphas, stay exact."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def check_device(options: TrainingOptions, device: torch.device) -> list[str]:
    """Check what depends on the device; returns warnings.

    Raises:
        UserError: the options need something that this machine does not have.
    """
    if (settings := compile_settings(options)) is not None:
        from library.memory.compiling import check_backend

        flag = "--compile_backend" if options.compile else "--dynamo_backend"
        check_backend(settings.backend, device, flag=flag)
    if options.attn_mode == "flex" and device.type == "cpu":
        raise UserError("--attn_mode flex: has no backward pass on a CPU; use --sdpa")
    warnings: list[str] = []
    switches = [name for name in ("cuda_allow_tf32", "cuda_cudnn_benchmark") if getattr(options, name)]
    if switches and device.type != "cuda":
        warnings.append(NoEffect(message(switches, "without an NVIDIA GPU")))
    if options.cpu_offload_checkpointing and options.gradient_checkpointing and device.type == "cpu":
        why = "on a CPU, where activations are on the host anyway"
        warnings.append(NoEffect(message(["cpu_offload_checkpointing"], why)))
    if options.fp8_matmul and (options.fp8_base or options.fp8_base_unet or options.fp8_te):
        from library.memory.stored_layers import multiplies_fp8

        if not multiplies_fp8(device):
            why = f"on this device ({device}), which does not multiply fp8 numbers; weights are dequantized instead"
            warnings.append(NoEffect(message(["fp8_matmul"], why)))
    return warnings


def activations(options: TrainingOptions) -> AbstractContextManager[object]:
    """Return the context of a forward pass of training."""
    if options.cpu_offload_checkpointing and options.gradient_checkpointing:
        from library.memory.host_activations import HostActivations

        return HostActivations()
    return nullcontext()


def generating(options: TrainingOptions) -> AbstractContextManager[None]:
    """Return the context of generating sample images."""
    if options.torch_compile or options.compile:
        from library.memory.compiling import uncompiled

        return uncompiled()
    return nullcontext()


def compile_settings(options: TrainingOptions) -> CompileSettings | None:
    """Return how the denoiser's blocks are compiled, if they are."""
    from library.memory.compiling import CompileSettings

    if options.torch_compile:
        return CompileSettings(options.dynamo_backend)
    if not options.compile:
        return None
    return CompileSettings(
        options.compile_backend,
        None if options.compile_mode == "default" else options.compile_mode,
        {"true": True, "auto": None}.get(options.compile_dynamic or "false", False),
        options.compile_fullgraph,
        options.compile_cache_size_limit,
    )


def compile_denoiser(denoiser: nn.Module, classes: tuple[str, ...], options: TrainingOptions) -> None:
    """Compile the denoiser's blocks, if the options ask for it.

    Raises:
        UserError: the family names no blocks.
    """
    settings = compile_settings(options)
    if settings is None:
        return
    from library.memory.compiling import compile_blocks

    if not compile_blocks(denoiser, classes, settings):
        flag = "--compile" if options.compile else "--torch_compile"
        raise UserError(f"{flag}: this model has no blocks that can be compiled one by one; remove it")


def set_cuda_switches(options: TrainingOptions) -> None:
    """Set torch's switches for NVIDIA GPUs that are asked for; without effect on other devices."""
    if options.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if options.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def precision_row(options: TrainingOptions, frozen: str, device: torch.device) -> str:
    """Return the row of the table before the first step; ``frozen`` describes the frozen weights."""
    return f"{options.mixed_precision}, frozen weights {frozen}, trained {str(trained_dtype(options))[6:]}, {device}"
