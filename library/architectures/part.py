"""The parts of a model: text encoders, denoiser and VAE, each loaded by itself, in its own dtype and place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from library.architectures.common.loading import ModelSource, load_frozen
from library.architectures.lora_target import LORA_TARGET, LoraTarget
from library.lazy_imports import without_collection
from library.memory.placing import STAYS

if TYPE_CHECKING:
    Blocks = Callable[[nn.Module], Sequence[Sequence[nn.Module]]]

#: names of parts
DENOISER = "denoiser"
VAE = "vae"


def text_encoder_name(number: int) -> str:
    """Return the name of a text encoder, counted from 1."""
    return f"text_encoder_{number}"


class Read(Protocol):
    """Builds the model of a source and fills it; on the device "meta" it has names and shapes but no weights."""

    def __call__(self, source: ModelSource, /, *, dtype: torch.dtype, device: str) -> nn.Module: ...


def built_by(build: Callable[[Any], nn.Module]) -> Read:
    """Return how to read a model that is built from its source's configuration and has all its tensors in the file."""

    def read(source: ModelSource, /, *, dtype: torch.dtype, device: str) -> nn.Module:
        return load_frozen(source, partial(build, source.config), dtype=dtype, device=device)

    return read


def no_blocks(model: nn.Module) -> Sequence[Sequence[nn.Module]]:
    """Return no lists of blocks."""
    return ()


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: "text_encoder_1", "denoiser", "vae".
        source: its file and configuration.
        read: builds and fills it.
        naming: its modules that carry adapters, and their names in files; None if there are none.
        blocks: model -> the lists of its repeated blocks, in the order in which they run.
        dtype: its own, as an option of the family says; None for the run's.
        device: where it stays and computes, as an option of the family says; None for the run's.
    """

    name: str
    source: ModelSource
    read: Read
    naming: LoraTarget | None = None
    blocks: Blocks = no_blocks
    dtype: torch.dtype | None = None
    device: str | None = None

    def load(self, *, dtype: torch.dtype, device: str) -> nn.Module:
        """Return the model, frozen, in eval mode, and marked with its naming.

        Args:
            dtype: of the run.
            device: of the run, or "meta".

        Raises:
            UserError: the file lacks tensors, or has wrong ones.
        """
        place = device if self.device is None or device == "meta" else self.device
        with without_collection():  # the model's class is imported now
            model = self.read(self.source, dtype=self.dtype or dtype, device=place)
        if self.naming is not None:
            setattr(model, LORA_TARGET, self.naming)
        if self.device is not None:
            setattr(model, STAYS, True)
        return model


def by_name(encoders: Sequence[Part], *others: Part) -> dict[str, Part]:
    """Return parts by their names, the text encoders first and in their order."""
    return {part.name: part for part in (*encoders, *others)}


def sources_of(parts: Mapping[str, Part]) -> dict[str, ModelSource]:
    """Return the files of parts, by name."""
    return {name: part.source for name, part in parts.items()}
