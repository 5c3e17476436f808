"""Enlarge image files with the latent upscaler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image as images

from library.architectures.common.checkpoint import vae_at, vae_identity
from library.architectures.common.kl_vae import build_vae, decode_latents
from library.architectures.common.loading import load_frozen
from library.data.image_io import read_image
from library.errors import UserError
from library.files.safetensors_io import is_pickle, read_header
from library.inference.generate import to_image
from library.inference.latent_upscaler import VAE_KEY, check_channels, load_latent_upscaler
from library.inference.png import save_png
from library.inference.upscaling import enlarged
from library.memory.placing import move

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
    """Write ``<stem>_upscaled.png`` for each image, twice as large; images that cannot be read are named at the end.

    Args:
        vae: file or folder of the VAE.
        with_lanczos: also write ``<stem>_lanczos4.png``, without the network.

    Raises:
        UserError: a file is missing, or something else; an image would replace another one.
    """
    _check_targets(paths, folder, with_lanczos=with_lanczos)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    upscaler = move(load_latent_upscaler(weights, "--weights"), device, dtype)
    source = vae_at(vae, flag="--vae_path")
    check_channels(source.config, f"--vae_path {vae}")
    trained_with = None if is_pickle(weights) else read_header(weights).metadata.get(VAE_KEY)
    if trained_with is not None and trained_with != vae_identity(source):
        logger.warning("--weights %s: was trained with another VAE than %s, whose latents may differ", weights, vae)
    model = load_frozen(source, partial(build_vae, source.config), dtype=torch.float32, device=str(device))
    written: list[Path] = []
    problems: list[str] = []
    for path in paths:  # one by one: each image has its own size
        try:
            image = images.fromarray(read_image(path))
        except UserError as error:
            problems.append(str(error))
            continue
        size = tuple(2 * side // _STEP * _STEP for side in image.size)
        if min(size) < _STEP:
            problems.append(f"{path}: is {image.width}x{image.height}; the shorter side must be {_STEP // 2} at least")
            continue
        with torch.inference_mode():
            latents = upscaler.upscale(model, [image], None, dtype, *size, batch_size, vae_batch_size)
            decoded = decode_latents(model, latents.float() / model.config.scaling_factor)
        target = _target(path, folder)
        save_png(to_image(decoded[0]), target, {})
        if with_lanczos:
            save_png(to_image(enlarged(image, size)), _lanczos(path, folder), {})
        logger.info("%s: %dx%d", target, *size)
        written.append(target)
    if problems:
        raise UserError("\n".join(problems))
    return written


def _target(path: Path, folder: Path) -> Path:
    return folder / f"{path.stem}_upscaled.png"


def _lanczos(path: Path, folder: Path) -> Path:
    return folder / f"{path.stem}_lanczos4.png"


def _check_targets(paths: Sequence[Path], folder: Path, *, with_lanczos: bool) -> None:
    """Raise UserError if an image would replace a source, or another one."""
    sources = {path.resolve() for path in paths}
    seen: dict[Path, Path] = {}
    for path in paths:
        for target in (_target(path, folder), *([_lanczos(path, folder)] if with_lanczos else [])):
            if target.resolve() in sources:
                raise UserError(f"{path}: its image {target} would replace one of --image_pattern; give another folder")
            if target in seen:
                raise UserError(f"{path}: its image {target} would replace that of {seen[target]}; rename one")
            seen[target] = path
