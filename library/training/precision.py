"""Apply the options of precision: dtypes of frozen and trained weights, and the place of activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from library.config.arguments import ModelOptions, TrainingOptions
from library.config.declaration import message
from library.errors import NoEffect, UserError


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
    if options.torch_compile:
        from library.memory.compiling import check_backend

        check_backend(options.dynamo_backend, device)
    warnings = []
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


def drawing(options: TrainingOptions) -> AbstractContextManager[None]:
    """Return the context of generating sample images."""
    if options.torch_compile:
        from library.memory.compiling import uncompiled

        return uncompiled()
    return nullcontext()


def compile_denoiser(denoiser: nn.Module, classes: tuple[str, ...], *, backend: str) -> None:
    """``--torch_compile``.

    Raises:
        UserError: the family names no blocks.
    """
    from library.memory.compiling import compile_blocks

    if not compile_blocks(denoiser, classes, backend=backend):
        raise UserError("--torch_compile: this model has no blocks that can be compiled one by one; remove it")


def precision_row(options: TrainingOptions, frozen: str, device: torch.device) -> str:
    """Return the row of the table before the first step; ``frozen`` describes the frozen weights."""
    return f"{options.mixed_precision}, frozen weights {frozen}, trained {str(trained_dtype(options))[6:]}, {device}"
