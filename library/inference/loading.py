"""Load the models of ``gen_img.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from library.architectures.base import Architecture
from library.inference.models import ImageModels
from library.inference.options import ImageOptions, attention_of
from library.inference.textual_inversion import add_bundled_words, add_embeddings, add_layered_embeddings
from library.inference.vae_slices import slice_vae
from library.memory.compiling import CompileSettings, check_backend, compile_blocks


def embeddings(options: ImageOptions) -> list[Path]:
    return [Path(path) for path in options.model.textual_inversion_embeddings or []]


def layered_embeddings(options: ImageOptions) -> list[Path]:
    return [Path(path) for path in options.model.XTI_embeddings or []]


def load_models(
    options: ImageOptions, architecture: Architecture, checkpoint: Any, dtype: torch.dtype, device: torch.device
) -> ImageModels:
    """Load the models of the options, with the words of their embedding files."""
    denoiser = architecture.load_denoiser(checkpoint, dtype=dtype, device=str(device))
    if options.speed.opt_channels_last:
        denoiser.to(memory_format=torch.channels_last)
    architecture.set_attention(denoiser, attention_of(options.speed), split=options.speed.split_attn)
    if options.speed.torch_compile:
        check_backend(options.speed.dynamo_backend, device)
        compile_blocks(denoiser, architecture.compiled_blocks, CompileSettings(backend=options.speed.dynamo_backend))
    vae_dtype = torch.float32 if options.model.no_half_vae else dtype
    tokenizers = architecture.load_tokenizers(checkpoint)
    # they are on the device while they encode, which is once for many images; see ``Session.generate``
    encoders = architecture.load_text_encoders(checkpoint, dtype=dtype, device="cpu")
    add_embeddings(embeddings(options), tokenizers, encoders)
    for network in options.networks.network_weights or []:
        add_bundled_words(Path(network), tokenizers, encoders)
    vae = architecture.load_vae(checkpoint, dtype=vae_dtype, device=str(device))
    if options.speed.vae_tiling:
        vae.enable_tiling()
    if options.speed.vae_slices is not None:
        slice_vae(vae, options.speed.vae_slices)
    layers = architecture.text_layers(denoiser)
    add_layered_embeddings(layered_embeddings(options), tokenizers[0], encoders[0], layers)
    return ImageModels(
        architecture=architecture,
        tokenizers=tokenizers,
        text_encoders=encoders,
        denoiser=denoiser,
        vae=vae,
        v_prediction=checkpoint.info.v_prediction,
    )
