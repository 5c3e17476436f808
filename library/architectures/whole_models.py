"""The part of ``Architecture`` for training and saving whole models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.part import Part, sources_of

if TYPE_CHECKING:
    from library.architectures.common.loading import ModelSource


@dataclass(frozen=True)
class SavedModel:
    """The settings of writing a whole model.

    Attributes:
        form: one of ``model_forms``.
        tokenizers: for forms that hold them.
        dtype: of floating-point tensors; ``None`` keeps each one's own.
        metadata: of safetensors files.
        counters: what ``.ckpt`` files hold beside weights: ``epoch`` and ``global_step``.
    """

    form: str
    tokenizers: Sequence[Any] = ()
    dtype: torch.dtype | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)


class WholeModels(ABC):
    """The questions about training and saving whole models; by default a family has none."""

    name: str
    text_encoder_targets: tuple[Any, ...]

    #: whether its text encoders are trained and saved with the denoiser, or are files of their own
    has_own_encoders: bool = True

    @property
    def trainable_encoders(self) -> tuple[bool, ...]:
        """For each text encoder, return whether ``--train_text_encoder`` trains it."""
        return (self.has_own_encoders,) * len(self.text_encoder_targets)

    #: learning rates of the text encoders after the second, as own options say
    further_encoder_rates: tuple[float | None, ...] = ()

    #: own options that decide which tensors a state holds
    shaping_options: tuple[str, ...] = ()
    #: forms in which a trained model can be saved: "safetensors", "ckpt", "diffusers", "diffusers_safetensors"
    model_forms: tuple[str, ...] = ()

    @abstractmethod
    def parts(self, checkpoint: Any) -> dict[str, Part]:
        """Return the model's parts by name, the text encoders first: ``text_encoder_1``, ``denoiser``, ``vae``."""

    def sources(self, checkpoint: Any) -> dict[str, ModelSource]:
        """Return the files of the parts, by name."""
        return sources_of(self.parts(checkpoint))

    def write(self, path: Path, checkpoint: Any, trained: Mapping[str, nn.Module], saved: SavedModel) -> None:
        """Write a whole model: the trained parts, and the others bit by bit as they were; streamed.

        Args:
            path: a file, or for "diffusers" forms a folder.
            trained: modules by the names of ``parts``.

        Raises:
            UserError: the disk is full, or the place cannot be written.
        """
        raise NotImplementedError(f"whole models of {self.name} are not saved")

    def unused_modules(self, name: str, part: nn.Module, *, clip_skip: int | None) -> list[nn.Module]:
        """Return the modules of a part whose outputs the model never uses: they get no gradients and do not change."""
        return []

    def frozen_modules(self, name: str, part: nn.Module) -> Sequence[nn.Module]:
        """Return the modules of a trained part that own options leave untrained."""
        return ()

    def files_beside(self, path: Path, trained: Collection[str]) -> Mapping[str, Path]:
        """Return the files that ``write`` makes beside ``path``, by the names of their parts.

        Args:
            trained: names of parts.
        """
        return {}

    has_learning_rate_blocks: bool = False

    def learning_rate_blocks(self, denoiser: nn.Module) -> list[list[nn.Parameter]]:
        """The denoiser's parameters by the block that a list of learning rates counts them to; none without blocks."""
        return []
