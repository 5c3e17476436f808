"""The text modules before the blocks of HunyuanImage-2.1's transformer, with the published tensor names.

Shape legend: B batch, T tokens of Qwen2.5-VL, G tokens of byT5, D features of a token, H heads, d features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.architectures.common.attention import attend
from library.architectures.common.transformer import sinusoids
from library.architectures.hunyuan_image.sizes import HunyuanSizes

NORM_EPS = 1e-6


class TimestepEmbedder(nn.Module):
    """(B,) timesteps, 0 to 1000 -> (B, D)."""

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.width = sizes.time
        self.mlp = nn.Sequential(nn.Linear(sizes.time, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, sizes.hidden))

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoids(timesteps, self.width).to(dtype))


class LayerNorm(nn.LayerNorm):
    """A layer norm whose weights follow the dtype of its input, which autocast leaves as it is on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class TextProjection(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GlyphMapper(nn.Module):
    """byT5's states (B, G, width) -> (B, G, D)."""

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.layernorm = LayerNorm(sizes.glyphs)
        self.fc1 = nn.Linear(sizes.glyphs, sizes.glyphs_inner)
        self.fc2 = nn.Linear(sizes.glyphs_inner, sizes.glyphs_inner)
        self.fc3 = nn.Linear(sizes.glyphs_inner, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(x))))))


class MLP(nn.Module):
    """Two linear layers around an activation: SiLU, or GELU's tanh form."""

    def __init__(self, sizes: HunyuanSizes, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.hidden, sizes.mlp)
        self.act = activation
        self.fc2 = nn.Linear(sizes.mlp, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenRefinerBlock(nn.Module):
    attention = "torch"  # see common/attention.py
    split_attention = False

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.heads = sizes.heads
        self.norm1 = LayerNorm(hidden, eps=NORM_EPS)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = LayerNorm(hidden, eps=NORM_EPS)
        self.mlp = MLP(sizes, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: (B, T, D).
            condition: (B, D).
            mask: (B, T) bool of tokens that are attended to; ``None`` for all.
        """
        gate, gate_mlp = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        query, key, value = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = attend(query, key, value, mask, backend=self.attention, split=self.split_attention)
        mixed = mixed.flatten(2)  # (B, T, D)
        x = x + gate * self.self_attn_proj(mixed)
        return x + gate_mlp * self.mlp(self.norm2(x))


class _Blocks(nn.Module):
    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TokenRefinerBlock(sizes) for _ in range(sizes.refiners))


class TokenRefiner(nn.Module):
    """Qwen2.5-VL's states (B, T, width) -> (B, T, D), with the timestep in mind."""

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(sizes.context, sizes.hidden)
        self.t_embedder = TimestepEmbedder(sizes)
        self.c_embedder = TextProjection(sizes.context, sizes.hidden)
        self.individual_token_refiner = _Blocks(sizes)

    def forward(self, states: Tensor, timesteps: Tensor, mask: Tensor | None) -> Tensor:
        """Args: ``mask`` (B, T) is True for a caption's tokens; ``None`` if all are."""
        if mask is None:
            mean = states.mean(dim=1)  # (B, width)
        else:
            seen = mask[..., None].to(states.dtype)
            mean = (states * seen).sum(dim=1) / seen.sum(dim=1)
        condition = self.t_embedder(timesteps, states.dtype) + self.c_embedder(mean)
        x = self.input_embedder(states)
        for block in self.individual_token_refiner.blocks:
            x = block(x, condition, mask)
        return x


def glyphs_first(text: Tensor, text_mask: Tensor, glyphs: Tensor, glyphs_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Join both texts so that padding comes last: glyphs, caption, padding of the glyphs, padding of the caption.

    Args:
        text: (B, T, D).
        text_mask: (B, T) bool.
        glyphs: (B, G, D).
        glyphs_mask: (B, G) bool.

    Returns:
        (B, G + T, D) and its mask (B, G + T) bool.
    """
    mask = torch.cat([glyphs_mask, text_mask], dim=1)  # (B, G + T)
    order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    both = torch.cat([glyphs, text], dim=1)
    return both.gather(1, order[..., None].expand(-1, -1, both.shape[-1])), mask.gather(1, order)
