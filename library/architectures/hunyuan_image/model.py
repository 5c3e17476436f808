"""The transformer of HunyuanImage-2.1, with the tensor names of the published file.

Tencent Hunyuan 2025, "HunyuanImage 2.1"; blocks of two streams and of one as in FLUX.1, text refined before them.

Shape legend:
    B  batch                              N  image tokens, h * w              T  text tokens, of both encoders
    L  all tokens, N + T                  D  features of a token (3584)       H  heads (28)
    d  features of a head (128)           C  latent channels (64)             M  features inside an MLP (14336)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.architectures.common.attention import attend, choose_attention
from library.architectures.common.fused import add_gated, modulated_norm, rotate
from library.architectures.common.transformer import RMSNorm
from library.architectures.hunyuan_image.sizes import HunyuanSizes
from library.architectures.hunyuan_image.text_blocks import (
    MLP,
    GlyphMapper,
    TimestepEmbedder,
    TokenRefiner,
    TokenRefinerBlock,
    glyphs_first,
)

ROPE_THETA = 256.0

#: cos and sin, (N, 1, d/2) float32 each
Rotation = tuple[Tensor, Tensor]


def rotation(rows: int, columns: int, axes: tuple[int, int], device: Any) -> Rotation:
    """Rotary positions of image tokens (Su et al. 2021, arXiv:2104.09864, eq. 14), row by row; text has none."""
    double = torch.float32 if torch.device(device).type == "mps" else torch.float64  # mps has no float64
    grid = torch.meshgrid(
        torch.arange(rows, dtype=double, device=device),
        torch.arange(columns, dtype=double, device=device),
        indexing="ij",
    )
    angles = []
    for position, width in zip(grid, axes, strict=True):
        powers = torch.arange(0, width, 2, dtype=double, device=device) / width
        angles.append(position.reshape(-1, 1) * ROPE_THETA**-powers)  # (N, width/2)
    turned = torch.cat(angles, dim=1)[:, None]  # (N, 1, d/2)
    return turned.cos().float(), turned.sin().float()


class Modulation(nn.Module):
    """Shifts, scales and gates from the activated conditioning vector: (B, D) -> parts of (B, 1, D)."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(hidden, parts * hidden)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.linear(vector).unflatten(-1, (self.parts, -1)).unsqueeze(2).unbind(1)


def split_heads(qkv: Tensor, heads: int, q_norm: RMSNorm, k_norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(B, tokens, 3D) -> (B, tokens, H, d) each."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return q_norm(query), k_norm(key), value


class MMDoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, attending to each other."""

    attention = "torch"  # see common/attention.py
    split_attention = False

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        hidden, self.heads = sizes.hidden, sizes.heads
        self.img_mod = Modulation(hidden, 6)
        self.img_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = RMSNorm(sizes.head)
        self.img_attn_k_norm = RMSNorm(sizes.head)
        self.img_attn_proj = nn.Linear(hidden, hidden)
        self.img_mlp = MLP(sizes, nn.GELU(approximate="tanh"))
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = RMSNorm(sizes.head)
        self.txt_attn_k_norm = RMSNorm(sizes.head)
        self.txt_attn_proj = nn.Linear(hidden, hidden)
        self.txt_mlp = MLP(sizes, nn.GELU(approximate="tanh"))

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, turn: Rotation, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            image: (B, N, D).
            text: (B, T, D).
            vector: (B, D), behind SiLU.
            mask: (B, L) bool of tokens that are attended to, the image's first; ``None`` for all.
        """
        i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2 = self.img_mod(vector)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.txt_mod(vector)
        i_qkv = self.img_attn_qkv(modulated_norm(image, i_shift, i_scale))
        t_qkv = self.txt_attn_qkv(modulated_norm(text, t_shift, t_scale))
        i_query, i_key, i_value = split_heads(i_qkv, self.heads, self.img_attn_q_norm, self.img_attn_k_norm)
        t_query, t_key, t_value = split_heads(t_qkv, self.heads, self.txt_attn_q_norm, self.txt_attn_k_norm)
        query = torch.cat([rotate(i_query, turn), t_query], dim=1)
        key = torch.cat([rotate(i_key, turn), t_key], dim=1)
        value = torch.cat([i_value, t_value], dim=1)
        mixed = attend(query, key, value, mask, backend=self.attention, split=self.split_attention)
        mixed = mixed.flatten(2)  # (B, L, D)
        from_image, from_text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        image = add_gated(image, i_gate, self.img_attn_proj(from_image))
        image = add_gated(image, i_gate2, self.img_mlp(modulated_norm(image, i_shift2, i_scale2)))
        text = add_gated(text, t_gate, self.txt_attn_proj(from_text))
        text = add_gated(text, t_gate2, self.txt_mlp(modulated_norm(text, t_shift2, t_scale2)))
        return image, text


class MMSingleStreamBlock(nn.Module):
    """Image and text as one stream; attention and MLP side by side in two linear layers."""

    attention = "torch"
    split_attention = False

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        hidden, self.heads, self.widths = sizes.hidden, sizes.heads, (3 * sizes.hidden, sizes.mlp)
        self.linear1 = nn.Linear(hidden, 3 * hidden + sizes.mlp)
        self.linear2 = nn.Linear(hidden + sizes.mlp, hidden)
        self.q_norm = RMSNorm(sizes.head)
        self.k_norm = RMSNorm(sizes.head)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x: Tensor, vector: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: (B, L, D), the image's tokens first.
            vector: (B, D), behind SiLU.
            mask: (B, L) bool; ``None`` for all.
        """
        shift, scale, gate = self.modulation(vector)
        qkv, inner = self.linear1(modulated_norm(x, shift, scale)).split(self.widths, dim=-1)  # (B, L, 3D), (B, L, M)
        query, key, value = split_heads(qkv, self.heads, self.q_norm, self.k_norm)
        count = turn[0].shape[0]  # image tokens
        query = torch.cat([rotate(query[:, :count], turn), query[:, count:]], dim=1)
        key = torch.cat([rotate(key[:, :count], turn), key[:, count:]], dim=1)
        mixed = attend(query, key, value, mask, backend=self.attention, split=self.split_attention)
        mixed = mixed.flatten(2)  # (B, L, D)
        return add_gated(x, gate, self.linear2(torch.cat([mixed, F.gelu(inner, approximate="tanh")], dim=-1)))


class ImageEmbed(nn.Module):
    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, kernel_size=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D), row by row."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, C)."""

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.hidden, sizes.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.hidden, 2 * sizes.hidden))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](vector)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


class HunyuanImage(nn.Module):
    """The whole transformer."""

    def __init__(self, sizes: HunyuanSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gradient_checkpointing = False
        self.img_in = ImageEmbed(sizes)
        self.txt_in = TokenRefiner(sizes)
        self.byt5_in = GlyphMapper(sizes)
        self.time_in = TimestepEmbedder(sizes)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(sizes) for _ in range(sizes.double_blocks))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(sizes) for _ in range(sizes.single_blocks))
        self.final_layer = FinalLayer(sizes)

    def set_attention(self, backend: str, *, split: bool = False) -> None:
        """Choose the implementation of attention, and whether each image is computed by itself.

        Raises:
            UserError: the implementation is not there.
        """
        kinds = (MMDoubleStreamBlock, MMSingleStreamBlock, TokenRefinerBlock)
        choose_attention((module for module in self.modules() if isinstance(module, kinds)), backend, split=split)

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        text_mask: Tensor | None,
        glyphs: Tensor,
        glyphs_mask: Tensor | None,
    ) -> Tensor:
        """Predict the velocity, noise minus latents.

        Args:
            latents: (B, C, h, w).
            timesteps: (B,), 0 to 1000; 1000 is pure noise.
            context: (B, tokens, width of Qwen2.5-VL's states).
            text_mask: (B, tokens), nonzero for a caption's tokens; each caption has one.
            glyphs: (B, tokens, width of byT5's states); there may be no tokens.
            glyphs_mask: (B, tokens), nonzero for the tokens of quoted text; ``None`` as ``text_mask`` where no text is
                padded.

        Returns:
            (B, C, h, w).
        """
        h, w = latents.shape[2:]
        image = self.img_in(latents)  # (B, N, D)
        # (B, D), activated once for the modulations of all blocks
        vector = F.silu(self.time_in(timesteps, latents.dtype))
        if text_mask is None or glyphs_mask is None:
            mask = None
            text = torch.cat([self.byt5_in(glyphs), self.txt_in(context, timesteps, None)], dim=1)
        else:
            text = self.txt_in(context, timesteps, text_mask.bool())
            text, mask = glyphs_first(text, text_mask.bool(), self.byt5_in(glyphs), glyphs_mask.bool())
            mask = torch.cat([mask.new_ones(image.shape[:2]), mask], dim=1)  # (B, L)
        turn = rotation(h, w, self.sizes.rope_axes, image.device)
        for block in self.double_blocks:
            image, text = self._run(block, image, text, vector, turn, mask)
        x = torch.cat([image, text], dim=1)
        for block in self.single_blocks:
            x = self._run(block, x, vector, turn, mask)
        predicted = self.final_layer(x[:, : h * w], vector)  # (B, N, C)
        return predicted.transpose(1, 2).unflatten(2, (h, w))

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
