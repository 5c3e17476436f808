"""A run's models on the meta device: names, shapes and dtypes as their files' headers tell, without any weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from library.architectures.base import Architecture
from library.memory.attention import attention_backend

if TYPE_CHECKING:
    from library.training.run import Run


def load_on_meta(architecture: Architecture, run: Run) -> list[tuple[str, nn.Module]]:
    """Give a run its models without weights; returns them with names for people.

    Raises:
        UserError: headers that lack tensors, or whose shapes do not fit.
    """
    checkpoint, training = run.checked.checkpoint, run.options.training
    run.text_encoders = architecture.load_text_encoders(checkpoint, dtype=run.weight_dtype, device="meta")
    run.denoiser = architecture.load_denoiser(checkpoint, dtype=run.weight_dtype, device="meta")
    architecture.set_attention(run.denoiser, attention_backend(training))
    vae_dtype = torch.float32 if run.options.model.no_half_vae else run.weight_dtype
    run.vae = architecture.load_vae(checkpoint, dtype=vae_dtype, device="meta")
    several = len(run.text_encoders) > 1
    named = [(f"text encoder {n}" if several else "text encoder", m) for n, m in enumerate(run.text_encoders, start=1)]
    return [*named, ("denoiser", run.denoiser), ("VAE", run.vae)]
