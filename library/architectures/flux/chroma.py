"""The Chroma transformer: FLUX.1 schnell whose modulation layers and pooled text are replaced by one small network.

Rock 2025, "Chroma1" (huggingface.co/lodestones/Chroma): the "approximator" gives a table of all modulations from the
timestep, the guidance scale and the row's number. Shape legend: see model.py; R rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.architectures.common.transformer import RMSNorm
from library.architectures.flux.model import Conditions, FluxTransformer, MLPEmbedder, thousandths
from library.architectures.flux.sizes import ApproximatorSizes, FluxSizes

#: padding tokens that stay visible after a caption, as in Chroma's own training
VISIBLE_PADDING = 1


class Approximator(nn.Module):
    """(B, R, inputs) -> (B, R, D)."""

    def __init__(self, sizes: ApproximatorSizes, out: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(sizes.inputs, sizes.hidden)
        self.layers = nn.ModuleList(MLPEmbedder(sizes.hidden, sizes.hidden) for _ in range(sizes.layers))
        self.norms = nn.ModuleList(RMSNorm(sizes.hidden, parameter="scale") for _ in range(sizes.layers))
        self.out_proj = nn.Linear(sizes.hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class Table(Conditions):
    """Rows of each block: single blocks first (3 each), then image and text of double blocks (6 each), the last 2."""

    def __init__(self, rows: Tensor, sizes: FluxSizes) -> None:
        self.rows = rows  # (B, R, D)
        self.image = 3 * sizes.single_blocks
        self.text = self.image + 6 * sizes.double_blocks

    def double(self, index: int) -> Tensor:
        starts = (self.image + 6 * index, self.text + 6 * index)
        return torch.cat([self.rows[:, start : start + 6] for start in starts], dim=1)  # (B, 12, D)

    def single(self, index: int) -> Tensor:
        return self.rows[:, 3 * index : 3 * index + 3]

    def last(self) -> Tensor:
        return self.rows[:, -2:]


def extend_mask(mask: Tensor, tokens: int) -> Tensor:
    """Unmask the first ``tokens`` padding tokens of each row: (B, T) -> (B, T) bool.

    The mask must hold all of a caption's tokens first and its padding after them.
    """
    valid = mask.bool().sum(dim=1, keepdim=True)  # (B, 1)
    return torch.arange(mask.shape[1], device=mask.device) < valid + tokens


class Chroma(FluxTransformer):
    text_first = False

    def __init__(self, sizes: FluxSizes) -> None:
        if sizes.approximator is None:
            raise ValueError("these are sizes of FLUX.1; Chroma has an approximator")
        super().__init__(sizes, modulation=False)
        self.distilled_guidance_layer = Approximator(sizes.approximator, sizes.hidden)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        text_mask: Tensor,
        guidance: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        visible_padding: int = VISIBLE_PADDING,
        double_residuals: Sequence[Tensor] | None = None,
        single_residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The velocity, noise minus latents.

        Args:
            text_mask: (B, T), nonzero for the caption's tokens, zero for padding, which comes last.
            guidance: (B,) scale; the published model is made for 0, the default.
            visible_padding: padding tokens that are attended to beside the caption's.

        The others, and what is returned, are as in ``Flux.forward``.
        """
        if guidance is None:
            guidance = torch.zeros_like(timesteps)
        return self._predict(
            latents,
            context,
            Table(self.modulations(timesteps, guidance, latents.dtype), self.sizes),
            size=size,
            text_mask=extend_mask(text_mask, visible_padding),
            double_residuals=double_residuals,
            single_residuals=single_residuals,
        )

    def modulations(self, timesteps: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,), (B,) -> (B, R, D)."""
        assert self.sizes.approximator is not None
        quarter, rows = self.sizes.approximator.inputs // 4, self.sizes.modulation_rows
        shared = torch.cat([thousandths(timesteps, quarter), thousandths(guidance, quarter)], dim=-1)  # (B, inputs/2)
        numbers = thousandths(torch.arange(rows, device=timesteps.device), 2 * quarter)  # (R, inputs/2)
        pairs = [shared[:, None].expand(-1, rows, -1), numbers.expand(len(shared), -1, -1)]
        return self.distilled_guidance_layer(torch.cat(pairs, dim=-1).to(dtype))
