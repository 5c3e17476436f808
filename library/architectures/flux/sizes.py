"""Infer every size of a FLUX.1 or Chroma transformer from the names and shapes of its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from library.architectures.common.expected import shape_of
from library.architectures.common.tensor_files import Shapes
from library.architectures.flux.names import CHROMA, DEV, Variant
from library.errors import UserError

PATCH = 2  # latent cells per token, in both directions


@dataclass(frozen=True)
class ApproximatorSizes:
    """Sizes of Chroma's network that replaces all modulation layers."""

    inputs: int = 64
    hidden: int = 5120
    layers: int = 5


@dataclass(frozen=True)
class FluxSizes:
    """The defaults are FLUX.1 dev's."""

    hidden: int = 3072
    head: int = 128  # width of one attention head
    mlp: int = 12288
    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = 64  # of a token: latent channels times PATCH squared
    out_channels: int = 64
    context: int = 4096  # width of T5's states
    pooled: int = 768  # width of CLIP's pooled output; 0 where it is not used
    time: int = 256  # sines and cosines of timestep and guidance; 0 where the approximator has its own
    guidance: bool = True  # whether the guidance scale is embedded
    approximator: ApproximatorSizes | None = None  # Chroma's

    @property
    def heads(self) -> int:
        return self.hidden // self.head

    @property
    def latent_channels(self) -> int:
        return self.in_channels // PATCH**2

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Return the rotated widths of a head per axis (text, row, column), which are not in the file.

        Published models have (16, 56, 56) of 128: an eighth, in multiples of 4, and two halves of the rest.
        """
        first = max(4 * round(self.head / 32), 4)
        return first, (self.head - first) // 2, (self.head - first) // 2

    @property
    def modulation_rows(self) -> int:
        """Rows of Chroma's table of modulations: shift, scale and gate of every block, shift and scale of the end."""
        return 3 * self.single_blocks + 12 * self.double_blocks + 2


#: (double, single) blocks of published models, by width; the second are FLUX.1 lite's
_DEPTHS = {3072: ((19, 38), (8, 38))}


def _check_depth(hidden: int, depth: tuple[int, int]) -> None:
    """Refuse a model that misses one of its last blocks; models with fewer blocks by design are others."""
    for double, single in _DEPTHS.get(hidden, ()):
        missing = double - depth[0], single - depth[1]
        if missing != (0, 0) and set(missing) <= {0, 1}:
            raise UserError(
                f"the transformer has {depth[0]} double and {depth[1]} single blocks where {double} and {single} are "
                "expected; the file is incomplete, download it again"
            )


def infer_sizes(shapes: Shapes) -> FluxSizes:
    """Infer sizes from names and shapes without prefix.

    Raises:
        UserError: the names do not add up to a FLUX.1 or Chroma transformer.
    """
    shape = partial(shape_of, shapes)
    hidden, in_channels = shape("img_in.weight")
    head = shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    if head % 4 or hidden % head:
        raise UserError(f"attention heads of width {head} do not fit {hidden} features; the file is damaged")
    variant = Variant.of(shapes)
    _check_depth(hidden, (variant.double_blocks, variant.single_blocks))
    approximator = None
    pooled = time = 0
    if variant.kind == CHROMA:
        width, inputs = shape("distilled_guidance_layer.in_proj.weight")
        approximator = ApproximatorSizes(inputs, width, variant.approximator_layers)
    else:
        pooled, time = shape("vector_in.in_layer.weight")[1], shape("time_in.in_layer.weight")[1]
    return FluxSizes(
        hidden=hidden,
        head=head,
        mlp=shape("double_blocks.0.img_mlp.0.weight")[0],
        double_blocks=variant.double_blocks,
        single_blocks=variant.single_blocks,
        in_channels=in_channels,
        out_channels=shape("final_layer.linear.weight")[0],
        context=shape("txt_in.weight")[1],
        pooled=pooled,
        time=time,
        guidance=variant.kind == DEV,
        approximator=approximator,
    )
