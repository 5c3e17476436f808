"""Where a family's adapted modules lie in original checkpoints and in diffusers, and how their names are made up.

A denoiser has two sets of module paths: those of its original checkpoint and those of diffusers. Most modules exist in
both. FLUX.1's joint projections (``qkv``, ``linear1``) are several modules in diffusers: they share the input, and
their outputs are rows of the joint module's.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.architectures.common.key_map import KeyMap
from library.architectures.common.ldm_unet import ldm_unet_layout


@dataclass(frozen=True)
class Place:
    """A module of diffusers in the original checkpoint: all rows of ``path``, or those of part ``index``."""

    path: str
    index: int = 0


class ModulePaths(ABC):
    """Two-way map between original module paths and diffusers'."""

    #: what paths consist of, beside numbers: published names have ``_`` for ``.``, which only this undoes
    words: frozenset[str]

    def __init__(self, words: str) -> None:
        self.words = frozenset(words.split())
        longest_first = sorted(self.words, key=len, reverse=True)
        self._component = re.compile(rf"({'|'.join(map(re.escape, longest_first))}|\d+)(?:_|$)")

    @abstractmethod
    def to_diffusers(self, original: str) -> tuple[str, ...]:
        """diffusers' modules that make up an original one, in the order of its rows; empty if it is unknown."""

    @abstractmethod
    def to_original(self, diffusers: str) -> Place | None:
        """Where a module of diffusers lies; None if it is unknown."""

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        """Rows of each of the modules that ``to_diffusers`` names, from the joint module's inputs and outputs.

        ``outputs`` may be left out for joint modules, where not all parts are known.
        """
        assert outputs is not None and len(self.to_diffusers(original)) == 1
        return [outputs]

    def swaps_halves(self, original: str) -> bool:
        """Whether diffusers has the second half of the module's rows first."""
        return False

    def dotted(self, underscored: str) -> str | None:
        """``a_b_0_c`` as the path ``a_b.0.c``; None if it is not made of this model's words."""
        components, position = [], 0
        while position < len(underscored):
            found = self._component.match(underscored, position)
            if found is None:
                return None
            components.append(found[1])
            position = found.end()
        path = ".".join(components)
        return path if path.replace(".", "_") == underscored else None

    def _is_known(self, path: str) -> bool:
        return all(part in self.words or part.isdigit() for part in path.split("."))


class SamePaths(ModulePaths):
    """Text encoders: every program has transformers' paths."""

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        return (original,) if self._is_known(original) else ()

    def to_original(self, diffusers: str) -> Place | None:
        return Place(diffusers) if self._is_known(diffusers) else None


class UNetPaths(ModulePaths):
    """The U-Net of Stable Diffusion: LDM's blocks against diffusers', transformers alike in both."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(_UNET_WORDS)
        self._keys: KeyMap = ldm_unet_layout(config).keys

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        path = self._keys.to_model(original)
        return (path,) if path is not None and self._is_known(original) else ()

    def to_original(self, diffusers: str) -> Place | None:
        path = self._keys.to_file(diffusers)
        return Place(path) if path is not None and self._is_known(diffusers) else None


class FluxPaths(ModulePaths):
    """FLUX.1 and Chroma, whose modules are a part of FLUX.1's and its approximator."""

    def __init__(self) -> None:
        super().__init__(_FLUX_WORDS)
        self._places = {part: Place(path, i) for path, parts in _FLUX.items() for i, part in enumerate(parts)}

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        template, number = _numbered(original)
        return tuple(part.replace("{}", number) for part in _FLUX.get(template, ()))

    def to_original(self, diffusers: str) -> Place | None:
        template, number = _numbered(diffusers)
        place = self._places.get(template)
        return None if place is None else Place(place.path.replace("{}", number), place.index)

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        parts = len(self.to_diffusers(original))
        if parts == 1:
            return super().rows(original, inputs=inputs, outputs=outputs)
        # queries, keys and values are as wide as the input; what remains is the MLP's
        rest = () if parts == 3 else (_FLUX_MLP_RATIO * inputs if outputs is None else outputs - 3 * inputs,)
        return [inputs] * 3 + [*rest]

    def swaps_halves(self, original: str) -> bool:
        return original == "final_layer.adaLN_modulation.1"  # (shift, scale); diffusers has (scale, shift)


def _numbered(path: str) -> tuple[str, str]:
    """(path with ``{}`` for the first number below a list of blocks, that number)."""
    found = re.match(r"([a-z_]*blocks|distilled_guidance_layer\.layers)\.(\d+)\.", path)
    return (f"{found[1]}.{{}}{path[found.end() - 1 :]}", found[2]) if found else (path, "")


_UNET_WORDS = """
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op conv
    time_embed label_emb out
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers conv1 conv2 conv_shortcut time_emb_proj
    time_embedding add_embedding linear_1 linear_2 conv_in conv_out
    proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj
"""

_FLUX_MLP_RATIO = 4
_FLUX_WORDS = """
    double_blocks single_blocks img_attn txt_attn qkv proj img_mlp txt_mlp img_mod txt_mod lin modulation linear1
    linear2 img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation linear
    distilled_guidance_layer in_proj out_proj layers
    transformer_blocks single_transformer_blocks attn to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out
    ff ff_context net norm1 norm1_context norm norm_out proj_mlp proj_out x_embedder context_embedder time_text_embed
    timestep_embedder text_embedder guidance_embedder linear_1 linear_2
"""
#: original module -> diffusers' modules, in the order of its rows
_FLUX: dict[str, tuple[str, ...]] = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
    "distilled_guidance_layer.layers.{}.in_layer": ("distilled_guidance_layer.layers.{}.linear_1",),
    "distilled_guidance_layer.layers.{}.out_layer": ("distilled_guidance_layer.layers.{}.linear_2",),
}

CLIP = SamePaths("""
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection
""")
T5 = SamePaths("""
    encoder block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo shared relative_attention_bias
""")
FLUX = FluxPaths()


def unet_paths(attention: Sequence[bool], **config: Any) -> UNetPaths:
    """Paths of a U-Net with two residual blocks in each level, ``attention`` telling which levels have transformers."""
    kinds: Iterable[str] = ("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention)
    return UNetPaths({"down_block_types": tuple(kinds), "layers_per_block": 2, **config})
