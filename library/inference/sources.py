"""The images that a generation starts from: finding and reading source images and masks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.config.image_settings import ImageSettings
from library.data.image_io import is_image_name, read_image, read_size, resize
from library.errors import UserError
from library.inference.feature_options.control_net import ControlOptions
from library.inference.options import ImageOutputOptions
from library.inference.plan import PlannedImage
from library.inference.png import read_texts
from library.inference.prompt_line import ImagePrompt, usable_size
from library.inference.region_masks import parts_of

#: default share of the steps that are run on an image
STRENGTH = 0.8

logger = logging.getLogger(__name__)

#: sides of an image that gives the size are rounded down to multiples of this many pixels, as published
SIZE_STEP = 32
#: relative change of an aspect ratio that is named
_STRETCH = 0.02


@dataclass(frozen=True)
class Sources:
    """The images of ``--image_path``, ``--mask_path`` and ``--guide_image_path``, which the planned images take in
    turn.

    Attributes:
        guides: images of ``--guide_image_path``; each planned image takes ``guides_each`` of them.
        controlled: whether they are for ControlNets.
        size: (W, H) that source images are resized to; None: each gives the size of its image.
        regions: the map of regions of the prompts' parts.
    """

    images: Sequence[Path] = ()
    masks: Sequence[Path] = ()
    guides: Sequence[Path] = ()
    guides_each: int = 1
    controlled: bool = False
    size: tuple[int, int] | None = None
    regions: Path | None = None

    @staticmethod
    def of(options: ImageOutputOptions, control: ControlOptions = ControlOptions(), *, networks: int = 0) -> Sources:
        """Find them, and read their headers.

        Args:
            networks: that are applied; with any, or without an image to start from, the mask is a map of regions.

        Raises:
            UserError: missing or unreadable files.
        """
        images = find_sources(Path(options.image_path), "--image_path") if options.image_path else []
        masks = find_sources(Path(options.mask_path), "--mask_path") if options.mask_path else []
        flag = "--guide_image_path"
        guides = [found for path in control.guide_image_path or [] for found in find_sources(Path(path), flag)]
        models = len(control.control_net_models or control.control_net_lllite_models or [])
        if len(guides) < models:
            raise UserError(f"{flag}: {len(guides)} images for {models} ControlNets; give one for each at least")
        for path in (*images, *masks, *guides):
            read_size(path)
        if options.use_original_file_name:
            _keep_sources(images, (*images, *masks), Path(options.outdir))
        size = None
        if options.W is not None and options.H is not None:
            size = usable_size(options.W, "--W", SIZE_STEP), usable_size(options.H, "--H", SIZE_STEP)
        regions = masks[0] if masks and (networks or not images) else None
        masks = masks if regions is None else []
        return Sources(images, masks, guides, max(models, 1), models > 0, size, regions)

    def assigned(self, planned: Sequence[PlannedImage], first: int = 0) -> list[PlannedImage]:
        """Give each planned image its source, mask, strength and size.

        Args:
            first: how many images were generated before, in an interactive session.
        """
        guided = [self._guided(image, first + image.place) for image in planned]
        return [self._started(image, first + image.place) for image in guided] if self.images else guided

    def _guided(self, image: PlannedImage, place: int) -> PlannedImage:
        image = replace(image, settings=with_regions(image.settings, self.regions))
        if not self.guides:
            return image
        start = place % (len(self.guides) // self.guides_each) * self.guides_each
        chosen = tuple(self.guides[start : start + self.guides_each])
        given = {"control": chosen} if self.controlled else {"guide": chosen[0]}
        return replace(image, settings=replace(image.settings, **given))

    def _started(self, image: PlannedImage, place: int) -> PlannedImage:
        source = self.images[place % len(self.images)]
        mask = self.masks[place % len(self.masks)] if self.masks else None
        width, height = self.size or size_of_source(source)
        for path in filter(None, (source if self.size else None, mask)):
            warn_if_stretched(path, (width, height))
        settings = replace(
            image.settings,
            image=source,
            mask=mask,
            strength=STRENGTH if image.settings.strength is None else image.settings.strength,
            width=width,
            height=height,
        )
        return replace(image, settings=settings)


def with_regions(settings: ImageSettings, regions: Path | None) -> ImageSettings:
    """Return settings with the map of regions, for a prompt of parts.

    Raises:
        UserError: the prompt has parts, and there is no map.
    """
    count = len(parts_of(settings.prompt))
    if regions is not None:
        return replace(settings, regions=regions, region_count=count)
    if count > 1:
        raise UserError(f'prompt "{settings.prompt}": parts joined with AND need a map of their regions, --mask_path')
    return settings


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
    width, height = (max(side // SIZE_STEP * SIZE_STEP, 2 * SIZE_STEP) for side in read_size(path))
    warn_if_stretched(path, (width, height))
    return width, height


@functools.cache  # images are read for every generated image, and named once
def warn_if_stretched(path: Path, size: tuple[int, int]) -> None:
    """Warn if resizing an image to (W, H), in pixels or latents, changes its aspect ratio."""
    width, height = read_size(path)
    if abs(size[0] / size[1] * height / width - 1) > _STRETCH:
        logger.warning("%s: %dx%d is stretched to the shape of %dx%d", path, width, height, *size)


def read_pixels(path: Path, size: tuple[int, int], *, background: str = "white") -> Tensor:
    """Return an image (3, H, W) in [-1, 1], resized to (W, H), transparency on ``background``.

    Raises:
        UserError: it cannot be read.
    """
    pixels = read_image(path, background=background)
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
