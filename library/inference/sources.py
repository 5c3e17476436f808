"""The images that a generation starts from: finding and reading source images and masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.data.image_io import is_image_name, read_image, read_size, resize
from library.errors import UserError
from library.inference.options import ImageOutputOptions
from library.inference.plan import PlannedImage
from library.inference.png import read_texts
from library.inference.prompt_line import ImagePrompt, usable_size

#: default share of the steps that are run on an image
STRENGTH = 0.8

logger = logging.getLogger(__name__)

#: sides of an image that gives the size are rounded down to multiples of this many pixels, as published
SIZE_STEP = 32


@dataclass(frozen=True)
class Sources:
    """The images of ``--image_path`` and ``--mask_path``, which the planned images take in turn.

    Attributes:
        size: (W, H) that source images are resized to; None: each gives the size of its image.
    """

    images: Sequence[Path] = ()
    masks: Sequence[Path] = ()
    size: tuple[int, int] | None = None

    @staticmethod
    def of(options: ImageOutputOptions) -> Sources:
        """Find them, and read their headers. Raises UserError: missing or unreadable files."""
        images = find_sources(Path(options.image_path), "--image_path") if options.image_path else []
        masks = find_sources(Path(options.mask_path), "--mask_path") if options.mask_path else []
        for path in (*images, *masks):
            read_size(path)
        if options.use_original_file_name:
            _keep_sources(images, (*images, *masks), Path(options.outdir))
        size = None
        if options.W is not None and options.H is not None:
            size = usable_size(options.W, "--W", SIZE_STEP), usable_size(options.H, "--H", SIZE_STEP)
        return Sources(images, masks, size)

    def assigned(self, planned: Sequence[PlannedImage], first: int = 0) -> list[PlannedImage]:
        """Give each planned image its source, mask, strength and size.

        Args:
            first: how many images were generated before, in an interactive session.
        """
        return [self._assigned(image, first + image.place) for image in planned] if self.images else list(planned)

    def _assigned(self, image: PlannedImage, place: int) -> PlannedImage:
        source = self.images[place % len(self.images)]
        width, height = self.size or size_of_source(source)
        settings = replace(
            image.settings,
            image=source,
            mask=self.masks[place % len(self.masks)] if self.masks else None,
            strength=STRENGTH if image.settings.strength is None else image.settings.strength,
            width=width,
            height=height,
        )
        return replace(image, settings=settings)


def _keep_sources(images: Sequence[Path], kept: Sequence[Path], outdir: Path) -> None:
    kept_names = {path.resolve() for path in kept}
    for path in images:
        target = outdir / f"{path.stem}.png"
        if target.resolve() in kept_names:
            raise UserError(
                f"--use_original_file_name: {target} is read as --image_path or --mask_path, and the new image would "
                "replace it; give another --outdir"
            )


def prompts_of_images(paths: Sequence[Path]) -> list[ImagePrompt]:
    """Return the prompts that images were generated with, from their PNG texts, to generate from them again.

    Raises:
        UserError: an image without a prompt.
    """
    prompts = []
    for path in paths:
        texts = read_texts(path)
        if "prompt" not in texts:
            raise UserError(f"{path}: its PNG texts hold no prompt; give --prompt or --from_file")
        negative = texts.get("negative_prompt", texts.get("negative-prompt"))
        prompts.append(ImagePrompt(texts["prompt"], negative))
    return prompts


def find_sources(path: Path, flag: str) -> list[Path]:
    """Return the file itself, or the images of a folder in the order of their names.

    Raises:
        UserError: no such file or folder, or none in it.
    """
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if is_image_name(entry.name) and entry.is_file())
        if not found:
            raise UserError(f"{flag} {path}: the folder holds no images")
        return found
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    return [path]


def size_of_source(path: Path) -> tuple[int, int]:
    """Return (W, H) to generate at: the image's own size, rounded down to multiples of 32 pixels, at least 64."""
    width, height = read_size(path)
    usable = tuple(max(side // SIZE_STEP * SIZE_STEP, 2 * SIZE_STEP) for side in (width, height))
    if abs(usable[0] / usable[1] * height / width - 1) > 0.02:
        logger.warning("%s: %dx%d is generated as %dx%d, which changes its shape", path, width, height, *usable)
    return usable[0], usable[1]


def read_pixels(path: Path, size: tuple[int, int]) -> Tensor:
    """Return an image (3, H, W) in [-1, 1], resized to (W, H). Raises UserError: it cannot be read."""
    pixels = read_image(path)
    if (pixels.shape[1], pixels.shape[0]) != size:
        pixels = resize(pixels, size, "lanczos")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1.0


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """Return a mask (h, w) in [0, 1], 1 where it is white, each value the mean over its part of the image.

    Args:
        size: (w, h).

    Raises:
        UserError: it cannot be read.
    """
    pixels = read_image(path, background="black")
    grey = np.ascontiguousarray(
        (pixels.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])).round().astype(np.uint8)
    )
    if (grey.shape[1], grey.shape[0]) != size:
        grey = resize(grey, size, "box")
    return torch.from_numpy(grey.astype(np.float32) / 255.0)
