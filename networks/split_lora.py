"""A separate LoRA for each projection that is stacked in one layer (``split_qkv``); files have one LoRA of the layer.

Transformers with joint attention have one linear layer for query, key and value (FLUX.1's ``linear1``: and the MLP's
first half). A LoRA of that layer shares its down half among all of them; here each of the k projections has its own
LoRA of rank r,

    W'_i = W_i + (alpha / r) U_i D_i,    i = 1..k.

Together they are a LoRA of rank k r, which is saved and which every program reads: D is the stacked D_i, (k r, in), and
U has the U_i on its block diagonal and zeros elsewhere, (out, k r). Its strength there is
alpha / (k r), so that the saved alpha is k times the given one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from networks.adapter_module import Dropouts
from networks.lora_in_pieces import LoraInPieces
from networks.targets import FoundModule, RankAlpha


def is_block_diagonal(up: Tensor, widths: Sequence[int]) -> bool:
    """Whether an up half (out, k r) is block diagonal for projections of these output features; zeros are."""
    if up.dim() != 2 or up.shape[0] != sum(widths) or up.shape[1] % len(widths):
        return False
    outside = up.detach().clone()
    for block in _blocks(outside, widths):
        block.zero_()
    return not outside.any()


def _blocks(up: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return views of the blocks on the diagonal, (width, r) each."""
    rank = up.shape[1] // len(widths)
    return [rows[:, i * rank : (i + 1) * rank] for i, rows in enumerate(up.split(list(widths)))]


class SplitLoraModule(LoraInPieces):
    """Low-rank changes of the projections in one ``Linear``.

    ``rank`` and ``alpha`` are those of the file, k times those of a projection. Pieces are ``down_0`` (r, in), ``up_0``
    (width of the projection, r), ``down_1``, ...
    """

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        self.widths = size.widths
        if size.rank % len(self.widths):
            raise ValueError(f"{found.lora_name}: rank {size.rank} does not divide into {len(self.widths)} projections")
        self.take_apart(self.lora_down.weight.chunk(len(self.widths)), _blocks(self.lora_up.weight, self.widths))

    def halves(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.pieces("down")), torch.block_diag(*self.pieces("up"))

    # ---- dropout ----

    def is_left_out(self) -> bool:
        """Return False: each projection's LoRA is dropped by itself."""
        return False

    @property
    def _drops_between_halves(self) -> bool:
        return super()._drops_between_halves or bool(self.dropouts.module)

    def _drop(self, hidden: Tensor, rank_axis: int) -> Tensor:
        hidden = super()._drop(hidden, rank_axis)
        if self.dropouts.module:
            kept = hidden.new_empty(len(self.widths)).bernoulli_(1.0 - self.dropouts.module)
            hidden = hidden * kept.repeat_interleave(self.rank // len(self.widths))  # (B, ..., k r)
        return hidden

    # ---- states and files ----

    def check_apart(self, up: Tensor, source: str) -> None:
        """Raise UserError if an up half (out, k r) of a file is not block diagonal."""
        if up.shape == (sum(self.widths), self.rank) and not is_block_diagonal(up, self.widths):
            raise UserError(
                f"{source}: the projections of {self.lora_name} are not apart in it, as split_qkv=True has them; leave "
                "split_qkv out, or take the ranks from the file (--dim_from_weights)"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        split = dict(state_dict)
        down, up = (split.pop(f"{prefix}lora_{half}.weight", None) for half in ("down", "up"))
        if down is not None and up is not None and up.shape == (sum(self.widths), self.rank):
            pieces = zip(down.chunk(len(self.widths)), _blocks(up, self.widths), strict=True)
            for number, (piece, block) in enumerate(pieces):
                split[f"{prefix}down_{number}"], split[f"{prefix}up_{number}"] = piece, block
        super()._load_from_state_dict(split, prefix, *args, **kwargs)
