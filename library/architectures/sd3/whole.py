"""Whole models of Stable Diffusion 3 and 3.5: which parts are trained, and the files they are saved in.

The transformer and the VAE share a file. Text encoders have files of their own, which every script takes as
``--clip_l``, ``--clip_g`` and ``--t5xxl``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from library.architectures.common import clip, kl_vae, t5
from library.architectures.common.loading import ModelSource
from library.architectures.common.model_writing import (
    LazyTensors,
    as_they_are,
    laid_out,
    refuse_own_source,
    state_of,
    write_file,
)
from library.architectures.model_info import ModelInfo
from library.architectures.sd3.checkpoint import SD3Checkpoint
from library.architectures.sd3.family import StableDiffusion3
from library.architectures.sd3.names import LAYOUTS, PREFIX
from library.architectures.sd3.options import FULL_DECLARATION, SD3FullOptions, SD3Options
from library.architectures.whole_models import SavedModel
from library.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from library.config.arguments import RunOptions

O = TypeVar("O")

#: part -> option that names its file, which is also the ending of the file's name
ENCODERS = {"text_encoder_1": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


class WholeStableDiffusion3(StableDiffusion3):
    """Stable Diffusion 3 where its own weights are trained."""

    declaration = FULL_DECLARATION
    model_forms = ("safetensors",)
    shaping_options = ("train_t5xxl", "num_last_block_to_freeze")

    _depth: int | None = None  # of the transformer; None before ``for_model``

    def for_model(self, checkpoint: SD3Checkpoint) -> Self:
        made = copy.copy(super().for_model(checkpoint))
        made._depth = checkpoint.sizes.depth
        return made

    def normalized(self, options: O) -> O:
        """Cache T5's outputs with ``--use_t5xxl_cache_only``."""
        own = self.chosen(SD3FullOptions)
        if not own.use_t5xxl_cache_only or own.train_t5xxl:  # a rule refuses both together
            return options
        dataset = replace(options.dataset, cache_text_encoder_outputs=True)  # type: ignore[attr-defined]
        return replace(options, dataset=dataset)  # type: ignore[type-var]

    def check_options(self, options: RunOptions, info: ModelInfo) -> None:
        own = self.chosen(SD3FullOptions)
        if own.train_t5xxl and not self._has_t5:
            raise UserError("--train_t5xxl: the model has no T5-XXL; name it with --t5xxl, or remove --train_t5xxl")
        frozen = own.num_last_block_to_freeze or 0
        if self._depth is not None and frozen > self._depth:
            raise UserError(f"--num_last_block_to_freeze {frozen}: the model has {self._depth} blocks")

    # ---- what is trained ----

    @property
    def trainable_encoders(self) -> tuple[bool, ...]:
        return (True, True, self.chosen(SD3FullOptions).train_t5xxl)[: len(self.text_encoder_targets)]

    @property
    def further_encoder_rates(self) -> tuple[float | None, ...]:  # type: ignore[override]
        return (self.chosen(SD3FullOptions).learning_rate_te3,)

    def frozen_modules(self, name: str, part: nn.Module) -> Sequence[nn.Module]:
        count = self.chosen(SD3FullOptions).num_last_block_to_freeze or 0
        return list(part.joint_blocks)[len(part.joint_blocks) - count :] if name == "denoiser" else ()

    # ---- files ----

    def files_beside(self, path: Path, trained: Collection[str]) -> dict[str, Path]:
        own = self.chosen(SD3Options)
        saved = {"clip_l": own.save_clip, "clip_g": own.save_clip, "t5xxl": own.save_t5xxl}
        there = list(ENCODERS.items())[: len(self.text_encoder_targets)]
        return {
            part: path.with_name(f"{path.stem}_{name}{path.suffix}")
            for part, name in there
            if part in trained or saved[name]
        }

    def write(self, path: Path, checkpoint: SD3Checkpoint, trained: Mapping[str, nn.Module], saved: SavedModel) -> None:
        """Write the transformer and the VAE to one file, as in sd-scripts, and trained text encoders beside it."""
        parts = self.sources(checkpoint)
        beside = self.files_beside(path, trained)
        for place in (path, *beside.values()):
            refuse_own_source(place, parts)
        layouts = {"denoiser": LAYOUTS.published(PREFIX), "vae": kl_vae.ldm_vae_layout(parts["vae"].config)}
        tensors: LazyTensors = {}
        for name, layout in layouts.items():
            tensors |= laid_out(layout, state_of(name, parts, trained))
        for part, place in beside.items():
            own = _encoder_tensors(part, state_of(part, parts, trained), parts[part])
            write_file(place, own, dtype=saved.dtype, metadata={}, counters=saved.counters)
        # last, so that a complete model has all its files
        write_file(path, tensors, dtype=saved.dtype, metadata=saved.metadata, counters=saved.counters)


def _encoder_tensors(part: str, state: Mapping[str, Tensor], source: ModelSource) -> LazyTensors:
    """Return a text encoder's tensors under transformers' names, as in published files."""
    if ENCODERS[part] == "t5xxl":
        # the embedding table has two names in the module
        return as_they_are({name: tensor for name, tensor in state.items() if name != t5.EMBEDDINGS})
    projects = "projection_dim" in source.config
    return laid_out(clip.clip_layout(prefix="" if projects else clip.TEXT_MODEL, projection=projects), state)


SD3_WHOLE = WholeStableDiffusion3()
