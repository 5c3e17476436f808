"""Position embeddings of image tokens: crops of the stored table, and tables for other image sizes.

The table is the two-dimensional sine and cosine embedding of Peebles & Xie 2023 (arXiv:2212.09748). Stable Diffusion 3
uses the middle of a larger one (Esser et al. 2024, section 5.3.2); 3.5-medium was trained with random crops.

Shape legend: B batch, g edge of a table in tokens, N tokens of an image, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.randomness import Draw

#: coordinates span this many units over an image's edge
SPAN = 16.0
MAX_PERIOD = 10_000.0
#: a table is larger than its images by this factor
MARGIN = 1.5
#: edge of a token in pixels
TOKEN = 16


# ---- windows ----


def random_crops(draw: Draw, rate: float) -> Tensor:
    """Draw the place of each sample's window, (B, 3) float64.

    Returns:
        For each sample, whether the window is moved (0 or 1), and the shares of the free rows and columns before it.
    """
    rows = [torch.rand(3, generator=g, dtype=torch.float64) for g in draw.generators("position crop")]
    drawn = torch.stack(rows)
    drawn[:, 0] = (drawn[:, 0] < rate).double()
    return drawn


def windows(grid: int, rows: int, columns: int, crop: Tensor) -> Tensor:
    """Return indices into a table of grid x grid positions, (B, N), on the device of ``crop`` (B, 3)."""
    moved = crop[:, :1] > 0
    free = torch.tensor([grid - rows, grid - columns], device=crop.device)
    # every free place is equally likely, also for shares just below 1
    drawn = torch.minimum((crop[:, 1:] * (free + 1)).long(), free)
    top, left = torch.where(moved, drawn, free // 2).unbind(1)  # (B,)
    down = top[:, None] + torch.arange(rows, device=crop.device)  # (B, rows)
    across = left[:, None] + torch.arange(columns, device=crop.device)
    return (down[:, :, None] * grid + across[:, None, :]).flatten(1)


def cropped(table: Tensor, rows: int, columns: int, crop: Tensor | None = None) -> Tensor:
    """Return the window of a table (1, g * g, D) for images of rows x columns tokens.

    Args:
        crop: (B, 3) from ``random_crops``; default: the middle for all.

    Returns:
        (1 or B, N, D).

    Raises:
        UserError: the images are larger than the table.
    """
    grid = math.isqrt(table.shape[1])
    if max(rows, columns) > grid:
        raise UserError(
            f"an image of {TOKEN * columns}x{TOKEN * rows} pixels is larger than the model's table of positions, which "
            f"ends at {TOKEN * grid} a side; use smaller images"
        )
    if crop is not None:
        return table[0][windows(grid, rows, columns, crop)]
    top, left = (grid - rows) // 2, (grid - columns) // 2
    window = table.view(1, grid, grid, -1)[:, top : top + rows, left : left + columns]
    return window.flatten(1, 2)


# ---- tables for other sizes ----


@lru_cache(maxsize=16)
def scaled_table(patched_edge: float, width: int, grid: int) -> Tensor:
    """Return a table (1, g * g, width) float32 for images of ``patched_edge`` tokens a side.

    Its coordinates span ``SPAN`` units over these images, and continue at the same scale beyond them.
    """
    index = torch.arange(grid, dtype=torch.float64)
    coordinates = SPAN * index / patched_edge - SPAN * (grid - patched_edge) / (2 * patched_edge)  # (g,)
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = coordinates[:, None] * frequencies  # (g, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (g, width / 2)
    columns, rows = axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, -1).float()


@dataclass(frozen=True)
class PositionTables:
    """A table for each resolution of a data set (--enable_scaled_pos_embed).

    Attributes:
        edges: of square images of each resolution, in tokens, rising.
    """

    edges: tuple[float, ...]

    @staticmethod
    def of(resolutions: Iterable[tuple[int, int]]) -> PositionTables:
        """Args: ``resolutions`` are (width, height) in pixels."""
        latent = {round(math.sqrt(width * height)) // 8 for width, height in resolutions}
        return PositionTables(tuple(edge / 2 for edge in sorted(latent)))

    def edge_for(self, tokens: int) -> float:
        """Return the smallest edge for images of this many tokens; the largest for all larger images."""
        for edge, larger in zip(self.edges, self.edges[1:], strict=False):
            if tokens <= int((edge**2 + larger**2) / 2):
                return edge
        return self.edges[-1]

    def table(self, rows: int, columns: int, width: int, device: Any) -> Tensor:
        """Return the table (1, g * g, width) for images of rows x columns tokens; a larger one for a longer side."""
        edge = self.edge_for(rows * columns)
        grid = int(MARGIN * edge)
        if max(rows, columns) > grid:
            edge = float(max(rows, columns))
            grid = int(MARGIN * edge)
        return _on(edge, width, grid, torch.device(device))


@lru_cache(maxsize=16)
def _on(edge: float, width: int, grid: int, device: torch.device) -> Tensor:
    return scaled_table(edge, width, grid).to(device)
