"""The transformer of Stable Diffusion 3 and 3.5, with the tensor names of the published files.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv:2403.03206):
MM-DiT, figure 2. SD3.5-medium adds a second attention of the image to itself in its first blocks (MM-DiT-X).

Shape legend:
    B  batch                              N  image tokens, h/2 * w/2          T  text tokens
    L  all tokens, T + N                  D  features of a token (1536)       H  heads (24)
    d  features of a head (64)            C  latent channels (16)             (h, w)  latent size
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.architectures.common.attention import attend, choose_attention
from library.architectures.common.fused import add_gated, modulated_norm
from library.architectures.common.transformer import RMSNorm, sinusoids
from library.architectures.sd3.positions import cropped
from library.architectures.sd3.sizes import MMDiTSizes

Heads = tuple[Tensor, Tensor, Tensor]


class Embedder(nn.Module):
    """Linear, SiLU, linear; of the timestep's sinusoids (``t_embedder``) and of the pooled text (``y_embedder``)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PatchEmbed(nn.Module):
    def __init__(self, sizes: MMDiTSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, kernel_size=sizes.patch, stride=sizes.patch)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D), row by row."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """The projections of one stream.

    Args:     projects_out: whether its outputs are used; the text's outputs in the last block are not.
    """

    def __init__(self, sizes: MMDiTSizes, *, projects_out: bool = True) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        if projects_out:
            self.proj = nn.Linear(sizes.hidden, sizes.hidden)
        self.ln_q = RMSNorm(sizes.head) if sizes.qk_norm else nn.Identity()
        self.ln_k = RMSNorm(sizes.head) if sizes.qk_norm else nn.Identity()

    def split(self, x: Tensor) -> Heads:
        """(B, tokens, D) -> queries, keys and values of (B, tokens, H, d)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.ln_q(query), self.ln_k(key), value


class MLP(nn.Module):
    def __init__(self, sizes: MMDiTSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.hidden, sizes.mlp)
        self.fc2 = nn.Linear(sizes.mlp, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulated(NamedTuple):
    """The tensors that one stream of a block needs after the attention."""

    gate: Tensor  # (B, 1, D) each
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class SingleDiTBlock(nn.Module):
    """One stream of a joint block: the image's (``x_block``) or the text's (``context_block``).

    Args:
        pre_only: for the text in the last block, which only gives keys and values.
        dual: whether the stream has a second attention, to itself alone.
    """

    attention = "torch"  # see common/attention.py
    split_attention = False

    def __init__(self, sizes: MMDiTSizes, *, pre_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        self.pre_only, self.chunks = pre_only, 2 if pre_only else 9 if dual else 6
        self.attn = SelfAttention(sizes, projects_out=not pre_only)
        self.attn2 = SelfAttention(sizes) if dual else None
        if not pre_only:
            self.mlp = MLP(sizes)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.hidden, self.chunks * sizes.hidden))

    def before(self, x: Tensor, condition: Tensor) -> tuple[Heads, Modulated | None, Tensor | None]:
        """Return queries, keys and values for the joint attention, the input of ``after``, and the second attention's
        output.

        Args:
            x: (B, tokens, D).
            condition: (B, D), of timestep and pooled text, behind SiLU.
        """
        parts = self.adaLN_modulation[1](condition).unflatten(-1, (self.chunks, -1)).unsqueeze(2).unbind(1)  # (B, 1, D)
        heads = self.attn.split(modulated_norm(x, parts[0], parts[1]))
        if self.pre_only:
            return heads, None, None
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = parts[:6]
        second = None
        if self.attn2 is not None:
            shift_2, scale_2, gate_2 = parts[6:]
            mixed = attend(
                *self.attn2.split(modulated_norm(x, shift_2, scale_2)),
                backend=self.attention,
                split=self.split_attention,
            )
            second = gate_2 * self.attn2.proj(mixed.flatten(2))
        return heads, Modulated(gate, shift_mlp, scale_mlp, gate_mlp), second

    def after(self, x: Tensor, mixed: Tensor, modulated: Modulated, second: Tensor | None) -> Tensor:
        """Add attention (B, tokens, D), the second one, and the MLP to the stream."""
        x = add_gated(x, modulated.gate, self.attn.proj(mixed))
        if second is not None:
            x = x + second
        return add_gated(x, modulated.gate_mlp, self.mlp(modulated_norm(x, modulated.shift_mlp, modulated.scale_mlp)))


class MMDiTBlock(nn.Module):
    """Text and image streams with separate weights and joint attention."""

    attention = "torch"
    split_attention = False

    def __init__(self, sizes: MMDiTSizes, index: int) -> None:
        super().__init__()
        self.context_block = SingleDiTBlock(sizes, pre_only=index == sizes.depth - 1)
        self.x_block = SingleDiTBlock(sizes, dual=index in sizes.dual_attention)

    def forward(self, context: Tensor, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            context: (B, T, D).
            x: (B, N, D).
            condition: (B, D), behind SiLU.

        Returns:
            The two streams; after the last block, the text is unchanged.
        """
        text_heads, text_parts, text_second = self.context_block.before(context, condition)
        image_heads, image_parts, image_second = self.x_block.before(x, condition)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text_heads, image_heads, strict=True))
        mixed = attend(query, key, value, backend=self.attention, split=self.split_attention).flatten(2)  # (B, L, D)
        from_text, from_image = mixed.split([context.shape[1], x.shape[1]], dim=1)
        assert image_parts is not None
        if text_parts is not None:
            context = self.context_block.after(context, from_text, text_parts, text_second)
        return context, self.x_block.after(x, from_image, image_parts, image_second)


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, patch * patch * C)."""

    def __init__(self, sizes: MMDiTSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.hidden, sizes.patch**2 * sizes.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.hidden, 2 * sizes.hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](condition).unflatten(-1, (2, -1)).unsqueeze(2).unbind(1)
        return self.linear(modulated_norm(x, shift, scale))


class MMDiT(nn.Module):
    """The whole transformer."""

    def __init__(self, sizes: MMDiTSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(sizes)
        self.t_embedder = Embedder(sizes.time, sizes.hidden)
        self.y_embedder = Embedder(sizes.pooled, sizes.hidden)
        self.context_embedder = nn.Linear(sizes.context, sizes.hidden)
        self.register_buffer("pos_embed", torch.zeros(1, sizes.grid**2, sizes.hidden))  # in the file, never trained
        self.joint_blocks = nn.ModuleList(MMDiTBlock(sizes, index) for index in range(sizes.depth))
        self.final_layer = FinalLayer(sizes)

    def set_attention(self, backend: str, *, split: bool = False) -> None:
        """Choose the implementation of attention. Raises UserError if it is not available."""
        blocks = (module for module in self.modules() if isinstance(module, (MMDiTBlock, SingleDiTBlock)))
        choose_attention(blocks, backend, split=split)

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        crop: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity, noise minus latents.

        Args:
            latents: (B, C, h, w).
            timesteps: (B,), 0 to 1000; 1000 is pure noise.
            context: (B, T, width of T5's states).
            pooled: (B, width of CLIP's pooled outputs).
            crop: (B, 3), places of the windows in the table of positions; default: its middle.
            positions: (1, g * g, D) another table of positions, such as one for the size of the images.

        Returns:
            (B, C, h, w).
        """
        h, w = latents.shape[2:]
        rows, columns = h // self.sizes.patch, w // self.sizes.patch
        dtype = latents.dtype
        x = self.x_embedder(latents)  # (B, N, D)
        table = self.pos_embed if positions is None else positions
        x = x + cropped(table, rows, columns, crop).to(dtype)
        time = sinusoids(timesteps, self.sizes.time).to(dtype)
        # (B, D), activated once for the modulations of all blocks
        condition = F.silu(self.t_embedder(time) + self.y_embedder(pooled))
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = self._run(block, context, x, condition)
        return unpatch(self.final_layer(x, condition), rows, columns, self.sizes.patch)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def unpatch(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Convert (B, N, patch * patch * C), a token's cells row by row with the channels last, to (B, C, h, w)."""
    grid = tokens.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, -1))  # (B, rows, columns, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
