"""The transformer of Lumina-Image 2.0 (NextDiT), with the tensor names of the published file.

Qin et al. 2025, "Lumina-Image 2.0: A Unified and Efficient Image Generative Framework" (arXiv:2503.21758), section 3.

Shape legend:
    B  batch                              N  image tokens, h/2 * w/2          T  text tokens
    L  all tokens, T + N                  D  features of a token (2304)       H  heads (24), K of keys and values (8)
    d  features of a head (96)            C  latent channels (16)             (h, w)  latent size
    P  features of the embedded timestep (1024)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.architectures.common.attention import attend, choose_attention
from library.architectures.common.fused import add_gated, rotate
from library.architectures.common.transformer import RMSNorm, sinusoids
from library.architectures.lumina.sizes import PATCH, NextDiTSizes

#: of the norms of blocks, captions, queries and keys
NORM_EPS = 1e-5
FINAL_EPS = 1e-6
ROPE_THETA = 10_000.0

#: cosines and sines, (B, L, 1, d/2) float32 each
Rotation = tuple[Tensor, Tensor]


# ---- positions ----


def rotation(positions: Tensor, axes: Sequence[int]) -> Rotation:
    """Rotary positions (Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 14), each axis with its own features.

    Args:
        positions: (B, L, 3) int64: (token, 0, 0) in the text, (length of the text, row, column) in the image.
        axes: features of a head that turn with each of the three.
    """
    double = torch.float32 if positions.device.type == "mps" else torch.float64  # mps has no float64
    angles = []
    for axis, width in enumerate(axes):
        powers = torch.arange(0, width, 2, dtype=double, device=positions.device) / width
        angles.append(positions[..., axis, None] * ROPE_THETA**-powers)  # (B, L, width/2)
    turned = torch.cat(angles, dim=-1)[:, :, None]  # (B, L, 1, d/2)
    return turned.cos().float(), turned.sin().float()


# ---- parts of blocks ----


class TimestepEmbedder(nn.Module):
    def __init__(self, sizes: NextDiTSizes) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(sizes.time, sizes.condition), nn.SiLU(), nn.Linear(sizes.condition, sizes.condition)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class JointAttention(nn.Module):
    """Attention whose queries share keys and values in groups (Ainslie et al. 2023, "GQA", arXiv:2305.13245)."""

    attention = "torch"  # see common/attention.py
    split_attention = False

    def __init__(self, sizes: NextDiTSizes) -> None:
        super().__init__()
        self.split = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        self.qkv = nn.Linear(sizes.hidden, sum(self.split) * sizes.head, bias=False)
        self.q_norm = RMSNorm(sizes.head, eps=NORM_EPS)
        self.k_norm = RMSNorm(sizes.head, eps=NORM_EPS)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D); ``mask`` (B, L) is False for tokens that nobody attends to."""
        heads = self.qkv(x).unflatten(-1, (sum(self.split), -1))  # (B, L, H + 2K, d)
        query, key, value = heads.split(self.split, dim=2)
        query, key = rotate(self.q_norm(query), turn), rotate(self.k_norm(key), turn)
        times = self.split[0] // self.split[1]
        key, value = (t.repeat_interleave(times, dim=2) for t in (key, value))
        return self.out(attend(query, key, value, mask, backend=self.attention, split=self.split_attention).flatten(2))


class FeedForward(nn.Module):
    """Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202), SwiGLU."""

    def __init__(self, sizes: NextDiTSizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.w2 = nn.Linear(sizes.mlp, sizes.hidden, bias=False)
        self.w3 = nn.Linear(sizes.hidden, sizes.mlp, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


# ---- blocks ----


class JointTransformerBlock(nn.Module):
    """Attention and MLP between norms on both sides.

    Args:
        modulation: whether the timestep scales and gates it; not in the refiner of captions.
    """

    def __init__(self, sizes: NextDiTSizes, *, modulation: bool) -> None:
        super().__init__()
        self.attention = JointAttention(sizes)
        self.feed_forward = FeedForward(sizes)
        self.attention_norm1 = RMSNorm(sizes.hidden, eps=NORM_EPS)
        self.ffn_norm1 = RMSNorm(sizes.hidden, eps=NORM_EPS)
        self.attention_norm2 = RMSNorm(sizes.hidden, eps=NORM_EPS)
        self.ffn_norm2 = RMSNorm(sizes.hidden, eps=NORM_EPS)
        self.adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(sizes.condition, 4 * sizes.hidden)) if modulation else None
        )

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, L, D).
            mask: (B, L) bool of tokens that are attended to, or None for all.
            condition: (B, P), behind SiLU; not without modulation.
        """
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), turn, mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        assert condition is not None
        parts = self.adaLN_modulation[1](condition).unflatten(-1, (4, -1)).unsqueeze(2).unbind(1)  # (B, 1, D) each
        scale, gate, scale_mlp, gate_mlp = parts
        mixed = self.attention(self.attention_norm1(x) * (1 + scale), turn, mask)
        x = add_gated(x, gate.tanh(), self.attention_norm2(mixed))
        return add_gated(x, gate_mlp.tanh(), self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))))


class FinalLayer(nn.Module):
    """(B, L, D) -> (B, L, patch * patch * C)."""

    def __init__(self, sizes: NextDiTSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.hidden, PATCH**2 * sizes.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.condition, sizes.hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale = self.adaLN_modulation[1](condition)[:, None]  # (B, 1, D)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=FINAL_EPS) * (1 + scale))


# ---- the sequence ----


class TokenSequence(NamedTuple):
    """The layout of each sample's sequence: caption, image, padding."""

    source: Tensor  # (B, L) int64, the place of each token among (caption with padding, image)
    positions: Tensor  # (B, L, 3)
    mask: Tensor  # (B, L) bool, False for padding
    image: Tensor  # (B, N) int64, where the image's tokens lie

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """(B, T, D) and (B, N, D) -> (B, L, D)."""
        return _taken(torch.cat([text, image], dim=1), self.source)


def _taken(tokens: Tensor, places: Tensor) -> Tensor:
    """(B, L, D) at places (B, N) -> (B, N, D)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def sequence(text_mask: Tensor, rows: int, columns: int) -> TokenSequence:
    """Put each image behind the tokens of its caption, so that padding comes last.

    The sequence is as long as captions with their padding and the images together: its length does not depend on the
    captions, and nothing waits for the device to know them.

    Args:
        text_mask: (B, T) bool, True for a caption's tokens, which come before its padding.
    """
    (batch, count), image = text_mask.shape, rows * columns
    lengths = text_mask.sum(dim=1, keepdim=True)  # (B, 1)
    place = torch.arange(count + image, device=text_mask.device).expand(batch, -1)  # (B, L)
    behind = place - lengths  # which of the image's tokens it is
    is_text, is_image = place < lengths, (behind >= 0) & (behind < image)
    # padding takes any token, and is masked
    source = torch.where(is_text, place, count + behind.clamp(0, image - 1))
    zero = torch.zeros_like(place)
    axes = (
        torch.where(is_text, place, lengths),
        torch.where(is_image, behind // columns, zero),
        torch.where(is_image, behind % columns, zero),
    )
    found = lengths + torch.arange(image, device=text_mask.device)  # (B, N)
    return TokenSequence(source, torch.stack(axes, dim=-1), is_text | is_image, found)


class NextDiT(nn.Module):
    """The whole transformer."""

    def __init__(self, sizes: NextDiTSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(PATCH**2 * sizes.channels, sizes.hidden)
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(sizes, modulation=True) for _ in range(sizes.refiners))
        self.context_refiner = nn.ModuleList(
            JointTransformerBlock(sizes, modulation=False) for _ in range(sizes.refiners)
        )
        self.t_embedder = TimestepEmbedder(sizes)
        self.cap_embedder = nn.Sequential(RMSNorm(sizes.caption, eps=NORM_EPS), nn.Linear(sizes.caption, sizes.hidden))
        self.layers = nn.ModuleList(JointTransformerBlock(sizes, modulation=True) for _ in range(sizes.layers))
        if sizes.final_norm:
            #: in the published file, and used by nothing
            self.norm_final = RMSNorm(sizes.hidden, eps=NORM_EPS)
        self.final_layer = FinalLayer(sizes)

    def set_attention(self, backend: str, *, split: bool = False) -> None:
        """Choose the implementation of attention. Raises UserError for one that is not there."""
        choose_attention((m for m in self.modules() if isinstance(m, JointAttention)), backend, split=split)

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def forward(self, latents: Tensor, times: Tensor, context: Tensor, text_mask: Tensor) -> Tensor:
        """Predict the flow towards the image: latents minus noise.

        Args:
            latents: (B, C, h, w).
            times: (B,), 0 to 1; 0 is pure noise, 1 the image.
            context: (B, T, width of the text encoder's states).
            text_mask: (B, T), nonzero for a caption's tokens, which come before its padding.

        Returns:
            (B, C, h, w).
        """
        (h, w), dtype = latents.shape[2:], latents.dtype
        rows, columns = h // PATCH, w // PATCH
        text_mask = text_mask.bool()
        # (B, P), activated once for the modulations of all blocks
        condition = F.silu(self.t_embedder(sinusoids(times, self.sizes.time).to(dtype)))
        text, image = self.cap_embedder(context), self.x_embedder(pack(latents))  # (B, T, D), (B, N, D)
        order = sequence(text_mask, rows, columns)
        turn = rotation(order.positions, self.sizes.rope_axes)
        image_turn = tuple(_taken(part.squeeze(2), order.image).unsqueeze(2) for part in turn)
        # captions lie at the beginning of every sequence: so do their positions, of padding too
        ids = torch.arange(text.shape[1], device=text.device).expand(len(text), -1)
        text_turn = rotation(torch.stack([ids, *[torch.zeros_like(ids)] * 2], dim=-1), self.sizes.rope_axes)
        for block in self.context_refiner:
            text = self._run(block, text, text_turn, text_mask)
        for block in self.noise_refiner:
            image = self._run(block, image, image_turn, None, condition)
        tokens = order.join(text, image)
        for block in self.layers:
            tokens = self._run(block, tokens, turn, order.mask, condition)
        return unpack(self.final_layer(_taken(tokens, order.image), condition), rows, columns)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, 4C), a token's cells row by row with the channels last."""
    grid = latents.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))  # (B, C, rows, p, columns, p)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``pack``."""
    grid = tokens.unflatten(1, (rows, columns)).unflatten(-1, (PATCH, PATCH, -1))  # (B, rows, columns, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
