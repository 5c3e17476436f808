"""Apply the options of precision: dtypes of frozen and trained weights, and the place of activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from library.config.arguments import RunOptions, TrainingOptions
from library.config.declaration import message
from library.errors import NoEffect, UserError
from library.training.models import Models
from library.training.text_caching import caches_texts


@dataclass(frozen=True)
class Fp8Parts:
    """The frozen models that are stored in fp8. They are loaded on the host, and moved after the conversion."""

    denoiser: bool
    text_encoders: bool

    @staticmethod
    def of(options: RunOptions) -> Fp8Parts:
        training = options.training
        both = training.fp8_base and not training.fp8_base_unet
        # with cached outputs only the trained encoders are loaded, which are small
        return Fp8Parts(training.fp8_base or training.fp8_base_unet, both and not caches_texts(options.dataset))

    def apply(self, models: Models, device: torch.device) -> None:
        """Convert the loaded models' weights; nothing can be merged into them afterwards."""
        from library.memory.fp8 import store_in_fp8

        if self.denoiser:
            store_in_fp8(models.denoiser, device)
        if self.text_encoders:
            for encoder in models.text_encoders:
                store_in_fp8(encoder, device)


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
    if options.cpu_offload_checkpointing and options.gradient_checkpointing and device.type == "cpu":
        return [NoEffect(message(["cpu_offload_checkpointing"], "on a CPU, where activations are on the host anyway"))]
    return []


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
        raise UserError("--torch_compile: this model has no blocks that can be compiled by themselves; remove it")


def precision_row(options: RunOptions, weight_dtype: torch.dtype, device: torch.device) -> str:
    """Return the row of the table before the first step."""
    training, fp8 = options.training, Fp8Parts.of(options)
    kept = "and text encoders " if fp8.text_encoders else ""
    frozen = f"{str(weight_dtype)[6:]}{f' (denoiser {kept}in scaled fp8)' if fp8.denoiser else ''}"
    return f"{training.mixed_precision}, frozen weights {frozen}, trained {str(trained_dtype(training))[6:]}, {device}"
