"""Attention for half-precision training on the CPU, at sizes where it is faster to keep the probabilities.

torch's CPU kernel never holds the matrix of tokens by tokens, and recomputes it in the backward pass. While that matrix
is small it is faster to keep it: a third less time for 1,024 tokens, half for 256 (``benchmarks/RESULTS.md``).

Shape legend: B batch, H heads, T query tokens, S key tokens, D features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from library.memory.attention import output, projected

#: most elements of a kept matrix of probabilities: 64 MB in half precision
MOST_KEPT = 32 * 2**20

#: float32 scores that are computed at a time: 8 MB, which stay in the processor's cache
SCORES_AT_A_TIME = 2 * 2**20


class _KeptProbabilities(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v. Scores and softmax are float32, as in torch's kernel; products are half precision."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.scale = query.shape[-1] ** -0.5
        # autocast would compute the scores in half precision, with steps of 1/16 above 16
        with torch.autocast(query.device.type, enabled=False):
            probabilities = _probabilities(query.float() * ctx.scale, key.float().transpose(1, 2), query.dtype)
            ctx.save_for_backward(query, key, value, probabilities)
            return torch.bmm(probabilities, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, probabilities = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            of_value = torch.bmm(probabilities.transpose(1, 2), gradient)
            of_probabilities = torch.bmm(gradient, value.transpose(1, 2))
            # the softmax's Jacobian: p * (g - sum(p * g))
            of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
            of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        return of_query, of_key, of_value


def _probabilities(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax of (B*H, T, D) times (B*H, D, S), some heads at a time: (B*H, T, S) of ``dtype``."""
    heads, tokens, keys = query.shape[0], query.shape[1], key.shape[2]
    at_a_time = max(1, SCORES_AT_A_TIME // (tokens * keys))
    if at_a_time >= heads:
        return torch.softmax(torch.bmm(query, key), dim=-1).to(dtype)
    probabilities = torch.empty((heads, tokens, keys), dtype=dtype)
    scratch = torch.empty((at_a_time, tokens, keys), dtype=query.dtype)
    for start in range(0, heads, at_a_time):
        part = slice(start, min(start + at_a_time, heads))
        scores = torch.bmm(query[part], key[part], out=scratch[: part.stop - start])
        probabilities[part] = torch.softmax(scores, dim=-1, out=scores)
    return probabilities


def is_quicker(query: Tensor, key: Tensor) -> bool:
    """Whether ``attend`` is faster for queries (B, H, T, D) and keys (B, H, S, D)."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad)
        and query.shape[:-1].numel() * key.shape[-2] <= MOST_KEPT
        and not torch.compiler.is_compiling()
    )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without a mask: (B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D)."""
    batched = (t.flatten(0, 1) for t in (query, key, value))
    return _KeptProbabilities.apply(*batched).unflatten(0, query.shape[:2])


class HostAttention:
    """A diffusers attention processor: ``attend`` where that is faster, the given processor elsewhere.

    It is for the attention of a U-Net's transformers, which has no norms and no residual connection inside.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if hidden_states.device.type != "cpu" or attention_mask is not None:
            return self._inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        heads = projected(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.transpose(1, 2) for x in heads)  # (B, H, L, D)
        if is_quicker(query, key):
            attended = attend(query, key, value)
        else:
            attended = functional.scaled_dot_product_attention(query, key, value)
        return output(attn, attended.transpose(1, 2))
