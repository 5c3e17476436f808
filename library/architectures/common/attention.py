"""Attention of the transformer families (FLUX, Chroma, ...): one function, several implementations of it.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), eq. 1: softmax(Q K^T / sqrt(d)) V.

Shape legend: B batch, H heads, d width of a head, Q queries, K keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.config.attention import PACKAGES
from library.errors import UserError, did_you_mean
from library.memory.attention import memory_efficient

#: implementation -> the package that it needs beside torch
BACKENDS: dict[str, str | None] = {
    "efficient": None,  # torch's kernels without a matrix of all tokens by all tokens
    "math": None,  # the plain formula
    **{name: None if needed is None else needed[0] for name, needed in PACKAGES.items()},
}


def check_backend(backend: str) -> str:
    """Return the name of a backend that can be used.

    Raises:
        UserError: no such backend, or its package is not installed.
    """
    if backend not in BACKENDS:
        raise UserError(
            f'attention "{backend}" is not known{did_you_mean(backend, BACKENDS)}; use one of: {", ".join(BACKENDS)}'
        )
    package = BACKENDS[backend]
    if package is not None and find_spec(package) is None:
        raise UserError(
            f'attention "{backend}" needs the package {package}, which is not installed; install it, or use --sdpa'
        )
    return backend


def choose_attention(blocks: Iterable[nn.Module], backend: str, *, split: bool) -> None:
    """Set the implementation of attention of blocks that call ``attend``.

    Raises:
        UserError: it is not available.
    """
    check_backend(backend)
    for block in blocks:
        block.attention, block.split_attention = backend, split


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    backend: str = "torch",
    split: bool = False,
) -> Tensor:
    """Attention of all heads.

    Args:
        query: (B, Q, H, d).
        key: (B, K, H, d); ``value`` too.
        key_mask: (B, K) bool, False for masked keys. Each row must have a key.
        backend: one of ``BACKENDS``, checked beforehand by ``check_backend``.
        split: compute row by row of the batch, which takes less memory.

    Returns:
        (B, Q, H, d).
    """
    if split and len(query) > 1:
        masks = [None] * len(query) if key_mask is None else key_mask.split(1)
        rows = zip(query.split(1), key.split(1), value.split(1), masks, strict=True)
        return torch.cat([_IMPLEMENTATIONS[backend](*row) for row in rows])
    return _IMPLEMENTATIONS[backend](query, key, value, key_mask)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, d) -> (B, H, L, d)
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, K)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _efficient(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    with memory_efficient(query.device.type):
        return _sdpa(query, key, value, key_mask)


def _math(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(query, key, value, key_mask)


def _flex(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    if query.device.type == "cpu" and _needs_gradients(query, key, value):
        raise UserError('attention "flex" has no backward pass on a CPU; train there with --sdpa')
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    modify = None
    if key_mask is not None:

        def modify(score: Tensor, b: Tensor, _h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
            return torch.where(key_mask[b, k], score, -math.inf)

    return _flex_function(query.is_cuda)(query, key, value, score_mod=modify).transpose(1, 2)


@cache
def _flex_function(compiled: bool) -> Callable[..., Tensor]:
    """Return FlexAttention: compiled, it needs no matrix of all tokens by all tokens; uncompiled, it runs on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _xformers(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if key_mask is not None:
        keys = key_mask.shape[1]
        padded = -(-keys // 8) * 8  # its kernels need rows of the bias that begin at multiples of 8
        bias = query.new_zeros(len(query), 1, 1, padded)
        bias[..., :keys].masked_fill_(~key_mask[:, None, None], -math.inf)
        bias = bias.expand(-1, query.shape[2], query.shape[1], -1)[..., :keys]  # (B, H, Q, K)
    return memory_efficient_attention(query, key, value, attn_bias=bias)


def _flash(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if key_mask is None:
        return flash_attn_func(query, key, value)
    # rows of different lengths, one after the other: all queries, and the keys that are not masked
    batch, queries = query.shape[:2]
    counts = key_mask.sum(dim=1, dtype=torch.int32)
    starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    rows = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * queries
    packed = flash_attn_varlen_func(
        query.flatten(0, 1), key[key_mask], value[key_mask], rows, starts, queries, key.shape[1]
    )
    return packed.unflatten(0, (batch, queries))


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _sageattn(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from sageattention import sageattn

    if _needs_gradients(query, key, value):
        raise UserError('attention "sageattn" has no backward pass and is for drawing only; train with --sdpa')
    if key_mask is not None:  # its kernels take no mask: each row is computed by itself, with its unmasked keys
        rows = [x.split(1) for x in (query, key, value)]
        parts = [(q, k[:, seen], v[:, seen]) for q, k, v, seen in zip(*rows, key_mask, strict=True)]
    else:
        parts = [(query, key, value)]
    return torch.cat([sageattn(*(x.contiguous() for x in part), tensor_layout="NHD") for part in parts])


_IMPLEMENTATIONS = {
    "torch": _sdpa,
    "efficient": _efficient,
    "math": _math,
    "flex": _flex,
    "xformers": _xformers,
    "flash": _flash,
    "sageattn": _sageattn,
}
