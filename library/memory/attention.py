"""The attention backend of a run, and attention without a matrix of all tokens by all tokens (``--mem_eff_attn``).

torch's ``scaled_dot_product_attention`` chooses among kernels, one of which is the plain formula with that matrix. Here
it may only use kernels like that of Rabe & Staats 2021 ("Self-attention Does Not Need O(n^2) Memory",
arXiv:2112.05682): on a GPU the memory-efficient one, which supports every dtype and every GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.config.arguments import TrainingOptions


def attention_backend(options: TrainingOptions) -> str:
    """Return the backend's name for ``Architecture.set_attention``."""
    if options.attn_mode is not None:
        return "torch" if options.attn_mode == "sdpa" else options.attn_mode
    if options.mem_eff_attn:
        return "efficient"
    return "xformers" if options.xformers else "torch" if options.sdpa else "math"


@contextmanager
def memory_efficient(device_type: str) -> Iterator[None]:
    """Allow only attention kernels that work piece by piece. On a CPU torch calls this kernel "flash"."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if device_type == "cpu" else SDPBackend.EFFICIENT_ATTENTION):
        yield


def projected(attn: Any, states: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value (B, L, H, D) of an attention of diffusers' U-Nets, which has no norms.

    Args:
        states: (B, T, C).
        text: (B, S, C'); None for self-attention.
    """
    context = states if text is None else text
    query, key, value = (
        layer(x).unflatten(-1, (attn.heads, -1))
        for layer, x in ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context))
    )
    return query, key, value


def output(attn: Any, attended: Tensor) -> Tensor:
    """Return the output (B, T, C) of an attention of diffusers' U-Nets for its heads (B, T, H, D)."""
    states = attended.flatten(2)
    for layer in attn.to_out:
        states = layer(states)
    return states


class MemoryEfficientAttention:
    """A diffusers attention processor around another that calls ``scaled_dot_product_attention``."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with memory_efficient(hidden_states.device.type):
            return self._inner(attn, hidden_states, *args, **kwargs)
