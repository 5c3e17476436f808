"""Convert files of ``networks.oft`` and ``networks.oft_flux`` to LyCORIS' Diag-OFT, which other programs read.

Both turn W (out, in) to R^T W with R = (I + Q) (I - Q)^-1, Q = B - B^T, in blocks of the outputs. Theirs is one tensor
``oft_blocks`` (n, k, k) for each module, below ``lora_unet_``, and an alpha that bounds |Q|, where 0 bounds nothing.
Our bound is computed differently by other programs. So the converter writes B = Q / 2 with our bound applied, and alpha
0, which is unambiguous. Projections that are stacked in one layer have blocks of their own
sizes here; there, they are put on the diagonals of blocks of one size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.errors import UserError
from networks.oft import PREFIX, generator_of, moved_by

_BLOCKS = re.compile(rf"{PREFIX}_(.+?)\.oft_blocks(?:\.(\d+))?")
PUBLISHED_PREFIX = "lora_unet"
#: largest difference of the two files' rotations; float32 rounding near 1
TOLERANCE = 1e-5


def is_own_layout(names: Mapping[str, object]) -> bool:
    return any(name.startswith(f"{PREFIX}_") for name in names)


def as_diag_oft(weights: Mapping[str, Tensor], title: str) -> dict[str, Tensor]:
    """Return the tensors in LyCORIS' layout, float32.

    Raises:
        UserError: an alpha is missing, or the rotations of what would be written are not those of the file.
    """
    by_module: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        if found := _BLOCKS.fullmatch(name):
            by_module.setdefault(found[1], {})[int(found[2] or 0)] = tensor
        elif not (name.startswith(f"{PREFIX}_") and name.endswith(".alpha")):
            raise UserError(f"{title}: {name}: no tensor of an OFT")
    written: dict[str, Tensor] = {}
    for module, parts in by_module.items():
        alpha = weights.get(f"{PREFIX}_{module}.alpha")
        if alpha is None or alpha.numel() != 1:
            raise UserError(f"{title}: {PREFIX}_{module}.alpha is missing beside oft_blocks")
        generators = [_bounded(parts[number].float(), float(alpha)) for number in sorted(parts)]
        blocks = joined([generator / 2 for generator in generators])
        _prove(generators, blocks, f"{title}: {PREFIX}_{module}")
        written[f"{PUBLISHED_PREFIX}_{module}.oft_blocks"] = blocks
        written[f"{PUBLISHED_PREFIX}_{module}.alpha"] = torch.tensor(0.0)
    return written


def _bounded(blocks: Tensor, alpha: float) -> Tensor:
    """Return Q (n, k, k) of one projection, whose bound is alpha times its outputs."""
    return generator_of(blocks, alpha * blocks.shape[0] * blocks.shape[1])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join blocks (n_i, k_i, k_i) of several projections to blocks (n, k, k) of the smallest size that holds them."""
    sizes = [size for part in parts for size in (part.shape[1],) * part.shape[0]]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    total = sum(sizes)
    width = next(
        width
        for width in range(max(sizes), total + 1)
        if total % width == 0
        and all(start // width == (start + size - 1) // width for start, size in zip(starts, sizes, strict=True))
    )
    blocks = parts[0].new_zeros(total // width, width, width)
    every = (block for part in parts for block in part)
    for start, size, block in zip(starts, sizes, every, strict=True):
        place = start % width
        blocks[start // width, place : place + size, place : place + size] = block
    return blocks


def _prove(generators: Sequence[Tensor], blocks: Tensor, title: str) -> None:
    """Compare R - I of both layouts, from which every weight's change follows: (R^T - I) W."""
    ours = torch.block_diag(*(block for generator in generators for block in moved_by(generator.double())))
    unit = torch.eye(blocks.shape[-1], dtype=torch.float64)
    skew = (blocks - blocks.transpose(1, 2)).double()
    theirs = torch.block_diag(*((unit + skew) @ torch.linalg.inv(unit - skew) - unit))
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(f"{title}: not written: its rotation would differ by {difference:.3g}")
