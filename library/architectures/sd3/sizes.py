"""Infer every size of an SD3 or SD3.5 transformer from the names and shapes in its file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial

from library.architectures.common.expected import shape_of
from library.architectures.common.tensor_files import Shapes
from library.errors import UserError

#: width of an attention head in all published models
HEAD = 64


@dataclass(frozen=True)
class MMDiTSizes:
    """The defaults are SD3-medium's."""

    hidden: int = 1536
    head: int = HEAD  # width of one attention head
    depth: int = 24  # joint blocks
    mlp: int = 6144
    patch: int = 2  # latent cells per token, in both directions
    channels: int = 16  # of the latents
    context: int = 4096  # width of T5's states, to which CLIP's are padded
    pooled: int = 2048  # CLIP-L's and CLIP-G's pooled outputs side by side
    time: int = 256  # sines and cosines of the timestep
    grid: int = 192  # edge of the table of positions, in tokens
    qk_norm: bool = False  # SD3.5
    dual_attention: tuple[int, ...] = ()  # blocks with a second attention of the image stream to itself: SD3.5-medium

    @property
    def heads(self) -> int:
        return self.hidden // self.head

    @property
    def version(self) -> str:
        """ "medium" (SD3), "5-medium" or "5-large": recorded as a part of ``ss_base_model_version``."""
        if not self.qk_norm:
            return "medium"
        return "5-medium" if self.dual_attention else "5-large"


def infer_sizes(shapes: Shapes) -> MMDiTSizes:
    """Infer the sizes from names and shapes without prefix.

    Raises:
        UserError: these are not the names of a complete SD3 transformer.
    """
    shape = partial(shape_of, shapes)
    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm[0] if norm else HEAD  # without the norms it is not in the file
    if hidden % head:
        raise UserError(f"attention heads of width {head} do not fit {hidden} features; the file is damaged")
    grid = math.isqrt(shape("pos_embed", 3)[1])
    if grid**2 != shapes["pos_embed"][1]:
        raise UserError(
            f"pos_embed has {shapes['pos_embed'][1]} positions, which is not a square number; the file is damaged"
        )
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"joint_blocks\.(\d+)\.", name))]
    dual = sorted({int(f[1]) for name in shapes if (f := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name))})
    return MMDiTSizes(
        hidden=hidden,
        head=head,
        depth=1 + max(blocks),
        mlp=shape("joint_blocks.0.x_block.mlp.fc1.weight")[0],
        patch=patch,
        channels=channels,
        context=shape("context_embedder.weight")[1],
        pooled=shape("y_embedder.mlp.0.weight")[1],
        time=shape("t_embedder.mlp.0.weight")[1],
        grid=grid,
        qk_norm=norm is not None,
        dual_attention=tuple(dual),
    )
