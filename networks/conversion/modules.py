"""The paths of a family's adapted modules in original checkpoints and in diffusers.

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
from library.architectures.flux.names import LINEARS, SWAPPED_HALVES, part_rows


@dataclass(frozen=True)
class Place:
    """A module of diffusers in the original checkpoint: all rows of ``path``, or those of part ``index``."""

    path: str
    index: int = 0


class ModulePaths(ABC):
    """Two-way map between original module paths and diffusers'."""

    #: the words of paths, beside numbers, which are needed to turn ``_`` of published names back into ``.``
    words: frozenset[str]

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(words)
        longest_first = sorted(self.words, key=len, reverse=True)
        self._component = re.compile(rf"({'|'.join(map(re.escape, longest_first))}|\d+)(?:_|$)")

    @abstractmethod
    def to_diffusers(self, original: str) -> tuple[str, ...]:
        """Return diffusers' modules of an original one, in the order of its rows; empty if it is unknown."""

    @abstractmethod
    def to_original(self, diffusers: str) -> Place | None:
        """Return the place of a module of diffusers; None if it is unknown."""

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        """Return the rows of each module of ``to_diffusers``, from the joint module's inputs and outputs.

        ``outputs`` may be left out for joint modules, where not all parts are known.
        """
        assert outputs is not None and len(self.to_diffusers(original)) == 1
        return [outputs]

    def swaps_halves(self, original: str) -> bool:
        """Whether diffusers has the second half of the module's rows first."""
        return False

    def dotted(self, underscored: str) -> str | None:
        """Return ``a_b_0_c`` as the path ``a_b.0.c``; None if it does not consist of this model's words."""
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
    """The U-Net of Stable Diffusion: LDM's blocks and diffusers', with equal transformers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(_UNET_WORDS.split())
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
        paths = [*LINEARS, *(part for parts in LINEARS.values() for part in parts)]
        super().__init__({word for path in paths for word in path.split(".") if word != "{}" and not word.isdigit()})
        self._places = {part: Place(path, i) for path, parts in LINEARS.items() for i, part in enumerate(parts)}

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        template, number = _numbered(original)
        return tuple(part.replace("{}", number) for part in LINEARS.get(template, ()))

    def to_original(self, diffusers: str) -> Place | None:
        template, number = _numbered(diffusers)
        place = self._places.get(template)
        return None if place is None else Place(place.path.replace("{}", number), place.index)

    def rows(self, original: str, *, inputs: int, outputs: int | None) -> list[int]:
        parts = len(self.to_diffusers(original))
        if parts == 1:
            return super().rows(original, inputs=inputs, outputs=outputs)
        return part_rows(parts, inputs=inputs, outputs=outputs)

    def swaps_halves(self, original: str) -> bool:
        return original in SWAPPED_HALVES


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

CLIP = SamePaths(
    """
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection
""".split()
)
T5 = SamePaths(
    """
    encoder block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo shared relative_attention_bias
    layer_norm final_layer_norm
""".split()
)
FLUX = FluxPaths()


def unet_paths(attention: Sequence[bool], **config: Any) -> UNetPaths:
    """Return the paths of a U-Net with two residual blocks per level; ``attention`` marks levels with transformers."""
    kinds: Iterable[str] = ("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention)
    return UNetPaths({"down_block_types": tuple(kinds), "layers_per_block": 2, **config})
