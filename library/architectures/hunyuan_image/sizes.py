"""Infer every size of a HunyuanImage-2.1 transformer from the names and shapes of its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from library.architectures.common.expected import block_count, shape_of
from library.architectures.common.tensor_files import Shapes
from library.errors import UserError


@dataclass(frozen=True)
class HunyuanSizes:
    """The defaults are those of HunyuanImage-2.1."""

    hidden: int = 3584
    head: int = 128  # width of one attention head
    mlp: int = 14336
    double_blocks: int = 20
    single_blocks: int = 40
    refiners: int = 2  # of the states of Qwen2.5-VL
    channels: int = 64  # of the latents; a token is one cell
    context: int = 3584  # width of Qwen2.5-VL's states
    glyphs: int = 1472  # width of byT5's states
    glyphs_inner: int = 2048
    time: int = 256  # sines and cosines of the timestep

    @property
    def heads(self) -> int:
        return self.hidden // self.head

    @property
    def rope_axes(self) -> tuple[int, int]:
        """Widths of a head that turn with the axes (row, column): a half each; they are not in the file."""
        return self.head // 2, self.head // 2


def infer_sizes(shapes: Shapes) -> HunyuanSizes:
    """Infer the sizes from names and shapes.

    Raises:
        UserError: the names do not add up to a HunyuanImage transformer.
    """
    shape = partial(shape_of, shapes)
    count = partial(block_count, shapes)
    hidden, channels, *_ = shape("img_in.proj.weight", 4)
    head = shape("double_blocks.0.img_attn_q_norm.weight", 1)[0]
    if head % 4 or hidden % head:
        raise UserError(f"attention heads of width {head} do not fit {hidden} features; the file is damaged")
    return HunyuanSizes(
        hidden=hidden,
        head=head,
        mlp=shape("double_blocks.0.img_mlp.fc1.weight")[0],
        double_blocks=count("double_blocks"),
        single_blocks=count("single_blocks"),
        refiners=count("txt_in.individual_token_refiner.blocks"),
        channels=channels,
        context=shape("txt_in.input_embedder.weight")[1],
        glyphs=shape("byt5_in.layernorm.weight", 1)[0],
        glyphs_inner=shape("byt5_in.fc1.weight")[0],
        time=shape("time_in.mlp.0.weight")[1],
    )
