"""Change the rank of LoRA files: replace each module's product of halves by the nearest one of the new rank.

The strength alpha / rank stays, so alpha changes with the rank. Names stay as they are in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from networks.file_names import TENSOR_NAMES
from networks.files.svd import RankOf, decompose_product

_DOWN, _UP = "lora_down.weight", "lora_up.weight"
#: how any program ends the names of halves, the longest first; some leave out ".weight"
_ENDINGS = {
    **{name: role for name, role in TENSOR_NAMES.items() if role in (_DOWN, _UP)},
    "lora_down": _DOWN,
    "lora_up": _UP,
    "lora_A": _DOWN,
    "lora_B": _UP,
    "down.weight": _DOWN,
    "up.weight": _UP,
    "down": _DOWN,
    "up": _UP,
}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, sorted(_ENDINGS, key=len, reverse=True)))})")


@dataclass(frozen=True)
class Module:
    """The result of resizing one module.

    Attributes:
        sum_kept, norm_kept: shares of the singular values' sum, and of their norm, that the new rank keeps.
        ratio: first singular value over the last that was kept.
    """

    name: str
    old_rank: int
    new_rank: int
    is_conv: bool
    alpha: float
    sum_kept: float
    norm_kept: float
    ratio: float

    def line(self) -> str:
        return (
            f"{self.name}: rank {self.old_rank} -> {self.new_rank}, sum {self.sum_kept:.1%}, "
            f"Frobenius {self.norm_kept:.1%}, max ratio {self.ratio:.1f}"
        )


def halves_in(weights: Mapping[str, Tensor], title: str) -> dict[str, tuple[str, str]]:
    """Return the names of a file's halves: module -> (down, up).

    Raises:
        UserError: no halves, one without the other, or a decomposition into three factors.
    """
    found: dict[str, dict[str, str]] = {}
    for key in weights:
        if ".lora_mid." in key:
            raise UserError(f"{title}: {key}: a decomposition into three factors, whose rank cannot be changed here")
        if match := _KEY.fullmatch(key):
            found.setdefault(match[1], {})[_ENDINGS[match[2]]] = key
    if not found:
        raise UserError(f"{title}: holds no pairs of halves (lora_down and lora_up), so it is no LoRA")
    for name, pair in found.items():
        if len(pair) < 2:
            raise UserError(f"{title}: {name}: one of its halves is missing; the file is incomplete")
    return {name: (pair[_DOWN], pair[_UP]) for name, pair in found.items()}


def resize(
    weights: Mapping[str, Tensor],
    title: str,
    rank_of: RankOf,
    conv_rank_of: RankOf,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], list[Module]]:
    """Return the tensors of the resized file, and what was done.

    Args:
        rank_of, conv_rank_of: give the new rank from the singular values; the second for all convolutions, 1x1 ones
            too,         as in sd-scripts.
        dtype: of halves and alphas; other tensors keep theirs.

    Raises:
        UserError: see ``halves_in``.
    """
    resized = dict(weights)
    modules = []
    for name, (down_key, up_key) in halves_in(weights, title).items():
        down, up = (weights[key].to(device=device, dtype=torch.float32) for key in (down_key, up_key))
        old_rank, is_conv = down.shape[0], down.dim() == 4
        if up.shape[1] != old_rank:
            raise UserError(f"{title}: {name}: halves of {list(down.shape)} and {list(up.shape)} do not fit")
        found = decompose_product(up.flatten(1), down.flatten(1))
        values = found.values
        rank = (conv_rank_of if is_conv else rank_of)(values)
        alpha_key = f"{name}.alpha"
        strength = float(weights[alpha_key]) / old_rank if alpha_key in weights else 1.0
        new_up, new_down = found.factors(rank)
        resized[down_key] = new_down.view(rank, *down.shape[1:]).to(device="cpu", dtype=dtype).contiguous()
        resized[up_key] = new_up.view(len(up), rank, *up.shape[2:]).to(device="cpu", dtype=dtype).contiguous()
        resized[alpha_key] = torch.tensor(strength * rank).to(dtype)
        whole, norm = float(values.sum()), float(values.square().sum().sqrt())
        modules.append(
            Module(
                name,
                old_rank,
                rank,
                is_conv,
                strength * rank,
                float(values[:rank].sum()) / whole if whole else 1.0,
                float(values[:rank].square().sum().sqrt()) / norm if norm else 1.0,
                float(values[0] / values[rank - 1]) if float(values[rank - 1]) else float("inf"),
            )
        )
    return resized, modules
