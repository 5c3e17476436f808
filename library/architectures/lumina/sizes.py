"""Infer every size of a Lumina-Image 2.0 transformer from the names and shapes of its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from library.architectures.common.expected import block_count, check_count, check_layers, shape_of
from library.architectures.common.tensor_files import Shapes
from library.errors import UserError

#: latent cells per token, in both directions
PATCH = 2
#: layers by width
_LAYERS = {2304: {26}}


@dataclass(frozen=True)
class NextDiTSizes:
    """The defaults are those of Lumina-Image 2.0."""

    hidden: int = 2304
    head: int = 96  # width of one attention head
    heads: int = 24
    kv_heads: int = 8  # of keys and values
    mlp: int = 9216
    layers: int = 26
    refiners: int = 2  # of captions, and of images
    channels: int = 16  # of the latents
    caption: int = 2304  # width of the text encoder's states
    time: int = 256  # sines and cosines of the timestep
    condition: int = 1024  # width of the embedded timestep
    final_norm: bool = True  # whether the file has the norm that nothing uses, and diffusers leaves out

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Widths of a head that turn with the axes (text, row, column): a third each; they are not in the file."""
        return (self.head // 3,) * 3


def infer_sizes(shapes: Shapes) -> NextDiTSizes:
    """Infer the sizes from names and shapes without prefix.

    Raises:
        UserError: the names do not add up to a Lumina-Image transformer.
    """
    shape = partial(shape_of, shapes)
    count = partial(block_count, shapes)
    hidden, inputs = shape("x_embedder.weight")
    head = shape("layers.0.attention.q_norm.weight", 1)[0]
    rows = shape("layers.0.attention.qkv.weight")[0]
    if head % 6 or hidden % head or (rows - hidden) % (2 * head):
        raise UserError(f"attention heads of width {head} do not fit {hidden} features; the file is damaged")
    layers, refiners = count("layers"), count("context_refiner")
    check_layers("transformer", layers, hidden, _LAYERS)
    check_count("transformer", "blocks of noise_refiner", count("noise_refiner"), refiners)
    return NextDiTSizes(
        hidden=hidden,
        head=head,
        heads=hidden // head,
        kv_heads=(rows - hidden) // (2 * head),
        mlp=shape("layers.0.feed_forward.w1.weight")[0],
        layers=layers,
        refiners=refiners,
        channels=inputs // PATCH**2,
        caption=shape("cap_embedder.0.weight", 1)[0],
        time=shape("t_embedder.mlp.0.weight")[1],
        condition=shape("t_embedder.mlp.0.weight")[0],
        final_norm="norm_final.weight" in shapes,
    )
