"""Enlarge image files with the latent upscaler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image as images

from library.architectures.common.checkpoint import vae_at
from library.architectures.common.kl_vae import build_vae, decode_latents
from library.architectures.common.loading import load_frozen
from library.data.image_io import read_image
from library.inference.generate import to_image
from library.inference.latent_upscaler import load_latent_upscaler
from library.inference.png import save_png
from library.inference.upscaling import enlarged

logger = logging.getLogger(__name__)

#: sides of enlarged images are multiples of this many pixels
_STEP = 8


def upscale_files(
    paths: Sequence[Path],
    folder: Path,
    *,
    vae: str,
    weights: Path,
    batch_size: int,
    vae_batch_size: int,
    with_lanczos: bool,
) -> list[Path]:
    """Write ``<stem>_upscaled.png`` for each image, twice as large.

    Args:
        vae: file or folder of the VAE.
        with_lanczos: also write ``<stem>_lanczos4.png``, without the network.

    Raises:
        UserError: a file is missing, or something else.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    upscaler = load_latent_upscaler(weights, "--weights").to(device=device, dtype=dtype)
    source = vae_at(vae)
    model = load_frozen(source, partial(build_vae, source.config), dtype=torch.float32, device=str(device))
    written = []
    for path in paths:  # one by one: each image has its own size
        pixels = read_image(path)
        image = images.fromarray(pixels)
        size = tuple(2 * side // _STEP * _STEP for side in image.size)
        with torch.inference_mode():
            latents = upscaler.upscale(model, [image], None, dtype, *size, batch_size, vae_batch_size)
            decoded = decode_latents(model, latents.float() / model.config.scaling_factor)
        target = folder / f"{path.stem}_upscaled.png"
        save_png(to_image(decoded[0]), target, {})
        if with_lanczos:
            save_png(to_image(enlarged(image, size)), folder / f"{path.stem}_lanczos4.png", {})
        logger.info("%s: %dx%d", target, *size)
        written.append(target)
    return written
