"""Tiny models of Lumina-Image 2.0 for tests, and the same weights in diffusers' transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.architectures.lumina import LUMINA, LuminaImage2
from library.architectures.lumina.checkpoint import LuminaCheckpoint
from library.architectures.lumina.model import NextDiT
from library.architectures.lumina.names import LISTS, Variant, tensor_pairs
from library.architectures.lumina.options import LuminaOptions
from tests.fixtures.tiny_lumina import MadeLumina


def opened(made: MadeLumina, **options: object) -> tuple[LuminaImage2, LuminaCheckpoint]:
    """Return the family with these options, and the inspected files."""
    apart = {name: str(path) for name, path in (("gemma2", made.gemma2), ("ae", made.ae)) if path is not None}
    family = LUMINA.changed(LuminaOptions, **{**apart, **options})
    checkpoint = family.inspect(str(made.path), tokenizer_cache_dir=str(made.tokenizer_cache_dir))
    return family.for_model(checkpoint), checkpoint


def in_diffusers_names(model: NextDiT) -> dict[str, Tensor]:
    """Return the tensors of a transformer under diffusers' names, joined layers taken apart."""
    state, sizes, found = model.state_dict(), model.sizes, {}
    counts = dict(zip(LISTS, (sizes.refiners, sizes.refiners, sizes.layers), strict=True))
    for pair in tensor_pairs(Variant(counts)):
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)[: len(pair.parts)]
        rows = [count * sizes.head for count in heads] if len(pair.parts) > 1 else [len(state[pair.published])]
        found |= dict(zip(pair.parts, state[pair.published].split(rows), strict=True))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def diffusers_transformer(model: NextDiT) -> nn.Module:
    """Return diffusers' own transformer with the weights of ours."""
    from diffusers import Lumina2Transformer2DModel

    sizes = model.sizes
    with torch.device("meta"):
        other = Lumina2Transformer2DModel(
            hidden_size=sizes.hidden, num_layers=sizes.layers, num_refiner_layers=sizes.refiners,
            num_attention_heads=sizes.heads, num_kv_heads=sizes.kv_heads, multiple_of=sizes.mlp,
            axes_dim_rope=sizes.rope_axes, cap_feat_dim=sizes.caption,
        )  # fmt: skip
    other.load_state_dict(in_diffusers_names(model), assign=True)
    other.rope_embedder.freqs_cis = other.rope_embedder._precompute_freqs_cis(
        sizes.rope_axes, other.rope_embedder.axes_lens, other.rope_embedder.theta
    )
    return other.eval()
