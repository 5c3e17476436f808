"""The FLUX.1 transformer, with the tensor names of the published files, and the part that Chroma shares.

Black Forest Labs 2024, "FLUX.1"; the double-stream blocks are those of Esser et al. 2024,
"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv:2403.03206), the single-stream blocks
follow Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters" (arXiv:2302.05442), section 2.

Shape legend:
    B  batch                              N  image tokens, h/2 * w/2          T  text tokens
    L  all tokens, T + N                  D  features of a token (3072)       H  heads (24)
    d  features of a head (128), D / H    C  channels of an image token (64)  M  features inside an MLP (12288)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.architectures.common.attention import attend, choose_attention
from library.architectures.common.fused import add_gated, modulated_norm, rotate
from library.architectures.common.transformer import RMSNorm, sinusoids
from library.architectures.flux.controlnet import residuals
from library.architectures.flux.packing import pack_latents, unpack_latents
from library.architectures.flux.sizes import PATCH, FluxSizes

ROPE_THETA = 10_000.0
#: timesteps and guidance are embedded as thousandths
TIME_FACTOR = 1000.0

#: cos and sin, (L, 1, d/2) float32 each
Rotation = tuple[Tensor, Tensor]


# ---- embeddings ----


def thousandths(values: Tensor, width: int) -> Tensor:
    """(B,) in [0, 1] -> (B, width) float32, see ``sinusoids``."""
    return sinusoids(TIME_FACTOR * values.float(), width)


def rotation(
    rows: int, columns: int, text_tokens: int, axes: Sequence[int], *, text_first: bool, device: Any
) -> Rotation:
    """Rotary positions (Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 14) of text and image tokens.

    A token has three coordinates, each of which turns its own ``axes`` features of a head: (0, row, column) in the
    image, (0, 0, 0) in the text.
    """
    double = torch.float32 if torch.device(device).type == "mps" else torch.float64  # mps has no float64
    ids = torch.zeros(3, rows, columns, dtype=double, device=device)
    ids[1] += torch.arange(rows, dtype=double, device=device)[:, None]
    ids[2] += torch.arange(columns, dtype=double, device=device)
    text = ids.new_zeros(3, text_tokens)
    positions = torch.cat([text, ids.flatten(1)] if text_first else [ids.flatten(1), text], dim=1)  # (3, L)
    angles = []
    for position, width in zip(positions, axes, strict=True):
        powers = torch.arange(0, width, 2, dtype=double, device=device) / width
        angles.append(position[:, None] * ROPE_THETA**-powers)  # (L, width/2)
    turned = torch.cat(angles, dim=1)[:, None]  # (L, 1, d/2)
    return turned.cos().float(), turned.sin().float()


class MLPEmbedder(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


# ---- parts of blocks ----


class QKNorm(nn.Module):
    def __init__(self, head: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head, parameter="scale")
        self.key_norm = RMSNorm(head, parameter="scale")


class Modulation(nn.Module):
    """Shifts, scales and gates of one stream from the activated conditioning vector: (B, D) -> (B, parts, D)."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden, parts * hidden)

    def forward(self, vector: Tensor) -> Tensor:
        return self.lin(vector).unflatten(-1, (self.parts, -1))


def parts_of(modulation: Tensor) -> tuple[Tensor, ...]:
    """(B, parts, D) -> parts of (B, 1, D)."""
    return modulation.unsqueeze(2).unbind(1)


def within_half(x: Tensor) -> Tensor:
    """Clamp to float16's range, which streams leave in some layers."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit) if x.dtype == torch.float16 else x


class SelfAttention(nn.Module):
    """The projections of one stream; both streams attend together."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.norm = QKNorm(sizes.head)
        self.proj = nn.Linear(sizes.hidden, sizes.hidden)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, tokens, D) -> three of (B, tokens, H, d)."""
        return split_heads(self.qkv(x), self.heads, self.norm)


def split_heads(qkv: Tensor, heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # (B, tokens, 3D) -> (B, tokens, H, d) each
    return norm.query_norm(query), norm.key_norm(key), value


def _mlp(sizes: FluxSizes) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(sizes.hidden, sizes.mlp), nn.GELU(approximate="tanh"), nn.Linear(sizes.mlp, sizes.hidden)
    )


# ---- blocks ----


class DoubleStreamBlock(nn.Module):
    """Image and text streams with separate weights and joint attention.

    Args:
        modulation: whether the block computes its shifts, scales and gates; if not, they are given (Chroma).
    """

    attention = "torch"  # see common/attention.py
    split_attention = False

    def __init__(self, sizes: FluxSizes, *, modulation: bool, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.img_mod = Modulation(sizes.hidden, 6) if modulation else None
        self.img_attn = SelfAttention(sizes)
        self.img_mlp = _mlp(sizes)
        self.txt_mod = Modulation(sizes.hidden, 6) if modulation else None
        self.txt_attn = SelfAttention(sizes)
        self.txt_mlp = _mlp(sizes)

    def forward(
        self, image: Tensor, text: Tensor, condition: Tensor, turn: Rotation, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            image: (B, N, D).
            text: (B, T, D).
            condition: (B, D) behind SiLU, or (B, 12, D) without modulation layers: six for the image, six for the text.
            mask: (B, L) bool, True for attended tokens, or None.
        """
        if self.img_mod is not None and self.txt_mod is not None:
            for_image, for_text = self.img_mod(condition), self.txt_mod(condition)
        else:
            for_image, for_text = condition.chunk(2, dim=1)
        i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2 = parts_of(for_image)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = parts_of(for_text)
        image_qkv = self.img_attn.queries_keys_values(modulated_norm(image, i_shift, i_scale))
        text_qkv = self.txt_attn.queries_keys_values(modulated_norm(text, t_shift, t_scale))
        query, key, value = (join(i, t, self.text_first) for i, t in zip(image_qkv, text_qkv, strict=True))
        query, key = rotate(query, turn).to(value.dtype), rotate(key, turn).to(value.dtype)
        mixed = attend(query, key, value, mask, backend=self.attention, split=self.split_attention).flatten(
            2
        )  # (B, L, D)
        from_image, from_text = part(mixed, image.shape[1], self.text_first)
        image = add_gated(image, i_gate, self.img_attn.proj(from_image))
        image = add_gated(image, i_gate2, self.img_mlp(modulated_norm(image, i_shift2, i_scale2)))
        text = add_gated(text, t_gate, self.txt_attn.proj(from_text))
        text = add_gated(text, t_gate2, self.txt_mlp(modulated_norm(text, t_shift2, t_scale2)))
        return within_half(image), within_half(text)


class SingleStreamBlock(nn.Module):
    """Image and text as one stream; attention and MLP side by side in two linear layers.

    Args:
        modulation: as for ``DoubleStreamBlock``.
    """

    attention = "torch"
    split_attention = False

    def __init__(self, sizes: FluxSizes, *, modulation: bool) -> None:
        super().__init__()
        self.heads, self.widths = sizes.heads, (3 * sizes.hidden, sizes.mlp)
        self.linear1 = nn.Linear(sizes.hidden, 3 * sizes.hidden + sizes.mlp)
        self.linear2 = nn.Linear(sizes.hidden + sizes.mlp, sizes.hidden)
        self.norm = QKNorm(sizes.head)
        self.modulation = Modulation(sizes.hidden, 3) if modulation else None

    def forward(self, x: Tensor, condition: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: (B, L, D).
            condition: (B, D) behind SiLU, or (B, 3, D) without a modulation layer.
            mask: as for ``DoubleStreamBlock``.
        """
        shift, scale, gate = parts_of(condition if self.modulation is None else self.modulation(condition))
        qkv, inner = self.linear1(modulated_norm(x, shift, scale)).split(self.widths, dim=-1)  # (B, L, 3D), (B, L, M)
        query, key, value = split_heads(qkv, self.heads, self.norm)
        query, key = rotate(query, turn).to(value.dtype), rotate(key, turn).to(value.dtype)
        mixed = attend(query, key, value, mask, backend=self.attention, split=self.split_attention).flatten(
            2
        )  # (B, L, D)
        inner = F.gelu(inner, approximate="tanh")
        return within_half(add_gated(x, gate, self.linear2(torch.cat([mixed, inner], dim=-1))))


class LastLayer(nn.Module):
    """(B, N, D) -> (B, N, C).

    Args:
        modulation: as for ``DoubleStreamBlock``.
    """

    def __init__(self, sizes: FluxSizes, *, modulation: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.hidden, sizes.out_channels)
        hidden = sizes.hidden
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden)) if modulation else None

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """Args: ``condition`` is (B, D) behind SiLU, or (B, 2, D) without a modulation layer."""
        if self.adaLN_modulation is not None:
            condition = self.adaLN_modulation[1](condition).unflatten(-1, (2, -1))
        shift, scale = parts_of(condition)
        return self.linear(modulated_norm(image, shift, scale))


def join(image: Tensor, text: Tensor, text_first: bool) -> Tensor:
    """Join along the token axis, (B, N, ...) and (B, T, ...) -> (B, L, ...)."""
    return torch.cat([text, image] if text_first else [image, text], dim=1)


def part(x: Tensor, image_tokens: int, text_first: bool) -> tuple[Tensor, Tensor]:
    """The inverse of ``join``: image, text."""
    text_tokens = x.shape[1] - image_tokens
    if text_first:
        text, image = x.split([text_tokens, image_tokens], dim=1)
    else:
        image, text = x.split([image_tokens, text_tokens], dim=1)
    return image, text


# ---- the models ----


class FluxTransformer(nn.Module):
    """The common part of FLUX.1 and Chroma, which differ in the source of the modulations."""

    text_first: bool  # order of the tokens in a joint sequence
    #: recompute each block in the backward pass
    gradient_checkpointing = False

    def __init__(self, sizes: FluxSizes, *, modulation: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.img_in = nn.Linear(sizes.in_channels, sizes.hidden)
        self.txt_in = nn.Linear(sizes.context, sizes.hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(sizes, modulation=modulation, text_first=self.text_first)
            for _ in range(sizes.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(sizes, modulation=modulation) for _ in range(sizes.single_blocks)
        )
        self.final_layer = LastLayer(sizes, modulation=modulation)

    def set_attention(self, backend: str, *, split: bool = False) -> None:
        """Args: ``backend`` as in common/attention.py. Raises UserError where it is not installed."""
        choose_attention((*self.double_blocks, *self.single_blocks), backend, split=split)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass (Chen et al. 2016, arXiv:1604.06174)."""
        self.gradient_checkpointing = True

    def _tokens(self, latents: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        """Packed latents and (h, w) in latent cells."""
        if latents.dim() == 4:
            return pack_latents(latents), (latents.shape[2], latents.shape[3])
        if size is None or (size[0] // PATCH) * (size[1] // PATCH) != latents.shape[1]:
            raise ValueError(f"{latents.shape[1]} packed tokens need their size in latent cells; got {size}")
        return latents, size

    def _predict(
        self,
        latents: Tensor,
        context: Tensor,
        conditions: Conditions,
        *,
        size: tuple[int, int] | None,
        text_mask: Tensor | None,
        double_residuals: Sequence[Tensor] | None,
        single_residuals: Sequence[Tensor] | None,
    ) -> Tensor:
        tokens, (h, w) = self._tokens(latents, size)
        image, text = self.img_in(tokens), self.txt_in(context)  # (B, N, D), (B, T, D)
        axes, first, device = self.sizes.rope_axes, self.text_first, image.device
        turn = rotation(h // PATCH, w // PATCH, text.shape[1], axes, text_first=first, device=device)
        mask = None
        if text_mask is not None:
            mask = join(text_mask.new_ones(image.shape[:2], dtype=torch.bool), text_mask.bool(), first)  # (B, L)
        for index, block in enumerate(self.double_blocks):
            image, text = self._run(block, image, text, conditions.double(index), turn, mask)
            image = _add_residual(image, double_residuals, index, len(self.double_blocks))
        x = join(image, text, first)
        for index, block in enumerate(self.single_blocks):
            x = self._run(block, x, conditions.single(index), turn, mask)
            if single_residuals:
                image, text = part(x, image.shape[1], first)
                x = join(_add_residual(image, single_residuals, index, len(self.single_blocks)), text, first)
        image, _ = part(x, image.shape[1], first)
        predicted = self.final_layer(image, conditions.last())
        return unpack_latents(predicted, (h, w)) if latents.dim() == 4 else predicted

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Conditions:
    """The modulating input of each block; the same vector for all."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    def double(self, index: int) -> Tensor:
        return self.vector

    def single(self, index: int) -> Tensor:
        return self.vector

    def last(self) -> Tensor:
        return self.vector


def _add_residual(image: Tensor, residuals: Sequence[Tensor] | None, index: int, blocks: int) -> Tensor:
    """Add a ControlNet's residual; each of its outputs serves several consecutive blocks of the transformer."""
    if not residuals:
        return image
    return image + residuals[index // math.ceil(blocks / len(residuals))]


class Flux(FluxTransformer):
    """FLUX.1 dev and schnell."""

    text_first = True

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__(sizes, modulation=True)
        self.time_in = MLPEmbedder(sizes.time, sizes.hidden)
        self.vector_in = MLPEmbedder(sizes.pooled, sizes.hidden)
        self.guidance_in = MLPEmbedder(sizes.time, sizes.hidden) if sizes.guidance else None
        #: runs within the forward pass, because FSDP gathers weights only while the sharded model runs
        self.controlnet: nn.Module | None = None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        text_mask: Tensor | None = None,
        double_residuals: Sequence[Tensor] | None = None,
        single_residuals: Sequence[Tensor] | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """The velocity, noise minus latents.

        Args:
            latents: (B, C/4, h, w), or packed (B, N, C).
            timesteps: (B,) in [0, 1]; 1 is pure noise.
            context: (B, T, T5's width).
            pooled: (B, CLIP's width).
            guidance: (B,) scale, e.g. 3.5. Models without its embedding (schnell) ignore it.
            size: (h, w) in latent cells, for packed latents.
            text_mask: (B, T), nonzero for attended text tokens; None for all.
            double_residuals: of a ControlNet, (B, N, D) each, added to the image after the double-stream blocks.
            single_residuals: the same after the single-stream blocks.
            image: (B, C/4, h, w) latents that ``controlnet`` reads; its residuals are added instead.

        Returns:
            Of the shape of ``latents``.
        """
        if image is not None:
            double_residuals, single_residuals = residuals(
                self.controlnet, latents, timesteps, context, pooled, guidance, image=image
            )
        dtype = latents.dtype
        vector = self.time_in(thousandths(timesteps, self.sizes.time).to(dtype))  # (B, D)
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model embeds the guidance scale and was given none")
            vector = vector + self.guidance_in(thousandths(guidance, self.sizes.time).to(dtype))
        vector = F.silu(vector + self.vector_in(pooled))  # once for the modulations of all blocks
        return self._predict(
            latents,
            context,
            Conditions(vector),
            size=size,
            text_mask=text_mask,
            double_residuals=double_residuals,
            single_residuals=single_residuals,
        )
