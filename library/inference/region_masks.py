"""Read the image that says which region of an image each part of a prompt is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from library.data.image_io import read_image

#: separates the parts of a prompt
PART = " AND "


def parts_of(prompt: str) -> list[str]:
    """Return the parts of a prompt, of which each may have its own region."""
    return [part.strip() for part in prompt.split(PART)]


def read_regions(path: Path, count: int, color_codes: int | None = None) -> Tensor:
    """Return the masks (count, H, W) in [0, 1] of the first parts, of the image's own size.

    The red, green and blue channel are for parts 1, 2 and 3; a channel without any light, and further parts, are for
    the whole image.

    Args:
        color_codes: instead, that many parts have the pixels of one pure color each: red, green, yellow, blue, magenta,
            cyan, white, black.

    Raises:
        UserError: the image cannot be read.
    """
    pixels = read_image(path, background="black")  # (H, W, 3)
    masks = []
    for part in range(count):
        if color_codes is not None and part < color_codes:
            bits = [(part + 1) >> bit & 1 for bit in range(3)]
            mask = (pixels == np.array(bits, dtype=np.uint8) * 255).all(axis=2).astype(np.float32)
        elif color_codes is None and part < 3 and pixels[..., part].any():
            mask = pixels[..., part].astype(np.float32) / 255.0
        else:
            mask = np.ones(pixels.shape[:2], np.float32)
        masks.append(torch.from_numpy(mask))
    return torch.stack(masks)


def resized(masks: Tensor, height: int, width: int) -> Tensor:
    """Return masks (n, H, W) as (n, height, width), each value the mean of its part."""
    return functional.interpolate(masks.unsqueeze(0), (height, width), mode="area")[0]
