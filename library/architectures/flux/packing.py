"""Latents as tokens: 2x2 cells side by side in one token, channel by channel.

Shape legend: B batch, C latent channels, (h, w) latent size, N = h/2 * w/2 tokens in rows, 4C channels of a token.
"""

from __future__ import annotations

from torch import Tensor

from library.architectures.flux.sizes import PATCH


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, 4C).

    Raises:
        ValueError: a side is odd.
    """
    batch, channels, h, w = latents.shape
    if h % PATCH or w % PATCH:
        raise ValueError(f"latents of {h}x{w} cells cannot be cut into patches of {PATCH}x{PATCH}")
    patches = latents.reshape(batch, channels, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (h // PATCH) * (w // PATCH), channels * PATCH**2)


def unpack_latents(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, 4C) -> (B, C, h, w), the inverse of ``pack_latents``.

    Args:
        size: (h, w) in latent cells.
    """
    batch, _, width = tokens.shape
    rows, columns = size[0] // PATCH, size[1] // PATCH
    patches = tokens.reshape(batch, rows, columns, width // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, width // PATCH**2, *size)
