"""Attention of diffusers' U-Nets by the implementations of the transformer families."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from library.architectures.common.attention import attend, check_backend
from library.memory.attention import output, projected


class UnetAttention:
    """A diffusers attention processor of a U-Net's transformer blocks, whose texts have no mask.

    Raises:
        UserError: the implementation is not available.
    """

    def __init__(self, backend: str, *, split: bool) -> None:
        self._backend, self._split = check_backend(backend), split

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, C) and (B, K, D), or None for self-attention -> (B, Q, C)."""
        if attention_mask is not None:
            raise NotImplementedError("texts of U-Nets have no mask")
        heads = projected(attn, hidden_states, encoder_hidden_states)  # (B, L, H, d) each
        return output(attn, attend(*heads, backend=self._backend, split=self._split))
