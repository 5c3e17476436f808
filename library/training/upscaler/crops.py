"""Crops of images, and the latents that a latent upscaler reads and should give.

Shape legend: B crops, C latent channels, (h, w) latent size, (H, W) pixels.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.data.image_io import read_image, read_size, resize
from library.data.image_tree import list_images
from library.errors import UserError
from library.inference.upscaling import enlarged
from library.randomness import permutation, python_rng

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CropSettings:
    """How crops are made.

    Attributes:
        side: of the large crops, pixels.
        small: side of the small ones, pixels.
    """

    side: int
    small: int
    flips: bool
    seed: int


@dataclass(frozen=True)
class Pixels:
    """Crops as they are, and made small and enlarged by Lanczos again: (B, 3, H, W) in [-1, 1]."""

    large: Tensor
    enlarged: Tensor

    def pinned(self) -> Pixels:
        """Return them in memory from which copies to the device do not wait."""
        return Pixels(self.large.pin_memory(), self.enlarged.pin_memory())


@dataclass(frozen=True)
class Latents:
    """What the network reads, and what it should give: (B, C, h, w) without the model's scale."""

    given: Tensor
    wanted: Tensor


def find_images(folder: Path, *, recursive: bool, side: int) -> list[Path]:
    """Return the images that are large enough for a crop, by path.

    Raises:
        UserError: no such folder, an image that cannot be read, or all are too small.
    """
    paths = list_images(folder, recursive=recursive, flag="--train_data_dir")
    problems: list[str] = []
    large: list[Path] = []
    small: list[Path] = []
    for path in paths:
        try:
            (large if min(read_size(path)) >= side else small).append(path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if not large:
        raise UserError(
            f"--train_data_dir {folder}: none of its {len(small)} images has {side} pixels on both sides; "
            "give larger ones, or a smaller --resolution"
        )
    if small:
        logger.warning(
            "%d of %d images are smaller than --resolution %d and left out, such as %s",
            *(len(small), len(paths), side, small[0]),
        )
    return large


def split(images: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Return the images to learn from and those to validate with, in keyed order; one of the latter, if any share.

    Raises:
        UserError: nothing would be left to learn from.
    """
    count = math.ceil(len(images) * share)
    if count >= len(images):
        raise UserError(
            f"--validation_split {share:g}: keeps all of {len(images)} images from training; give more images, or 0"
        )
    order = permutation(len(images), seed, "upscaler validation")
    held = set(order[:count])
    return [p for i, p in enumerate(images) if i not in held], [images[i] for i in order[:count]]


def digest(images: Sequence[Path], folder: Path) -> str:
    """Return a digest of the images' names and sizes in bytes, by which a resumed run recognizes its data."""
    lines = sorted(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in images)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class Crops:
    """Crops of images; which image and where follows from the seed and the crop's number alone."""

    def __init__(self, images: Sequence[Path], settings: CropSettings, purpose: str) -> None:
        self._images, self._settings, self._purpose = images, settings, purpose
        self._order: tuple[int, list[int]] = (-1, [])

    def read(self, numbers: Sequence[int]) -> Pixels:
        """Read crops by their numbers; each image comes once before one comes again.

        Raises:
            UserError: an image cannot be read, or has become too small.
        """
        pairs = [self._read(number) for number in numbers]
        return Pixels(*(torch.stack(list(part)) for part in zip(*pairs, strict=True)))

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        own = self._settings
        path = self._image(number)
        pixels = read_image(path)
        height, width = pixels.shape[:2]
        if min(height, width) < own.side:
            raise UserError(f"{path}: is {width}x{height} now, and was larger when the run began")
        rng = python_rng(own.seed, self._purpose, "crop", number)
        left, top = rng.randint(0, width - own.side), rng.randint(0, height - own.side)
        large = pixels[top : top + own.side, left : left + own.side]
        if own.flips and rng.random() < 0.5:
            large = large[:, ::-1]
        large = np.ascontiguousarray(large)
        small = resize(large, (own.small, own.small), None)
        size = (own.side, own.side)
        return enlarged(Image.fromarray(large), size), enlarged(Image.fromarray(small), size)

    def _image(self, number: int) -> Path:
        epoch, place = divmod(number, len(self._images))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._images), self._settings.seed, self._purpose, epoch))
        return self._images[self._order[1][place]]


@torch.no_grad()
def encode(vae: nn.Module, pixels: Pixels, at_once: int) -> Latents:
    """Return the latents of crops, on the VAE's device: the means of its distributions, as the upscaler reads them."""
    weight = next(vae.parameters())

    def latents(part: Tensor) -> Tensor:
        moved = part.to(weight.device, weight.dtype, non_blocking=True)
        return torch.cat([vae.encode(some).latent_dist.mode().float() for some in moved.split(at_once)])

    return Latents(given=latents(pixels.enlarged), wanted=latents(pixels.large))
