"""Attention of diffusers' U-Nets by the implementations of the transformer families."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from library.architectures.common.attention import attend, check_backend


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
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1))  # (B, L, H, d)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        mixed = attend(query, key, value, backend=self._backend, split=self._split).flatten(2)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed
