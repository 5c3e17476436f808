"""The dtype, storage and place of each part of a model during a run, decided here and nowhere else.

A plan holds no weights. Loading asks it where a part is loaded to and in which dtype, and lets it give the loaded
modules their final form; the table of ``--dry_run`` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from library.memory.forms import FORMS
from library.memory.placing import move

#: plain: whole, in one place; sharded: in pieces over the processes; swapped: some blocks wait on the host; cached:
#: only its outputs are needed, so it has no weights in training
Storage = Literal["plain", "sharded", "swapped", "cached"]
#: where a part is between its uses
Home = Literal["device", "host", "none"]


@dataclass(frozen=True)
class PartPlan:
    """The dtype, storage and place of one part in training."""

    name: str  # "denoiser", "text_encoder_1", "vae"
    dtype: torch.dtype  # of its weights, or that they are computed in
    storage: Storage = "plain"
    home: Home = "device"
    trained: bool = False
    swapped: int = 0  # blocks, as asked for
    form: str | None = None  # of the weights of its blocks, in ``FORMS``; None for ``dtype``

    @property
    def title(self) -> str:
        """Return the name for messages."""
        return "VAE" if self.name == "vae" else self.name.replace("_", " ")

    def describe(self) -> str:
        """Return a description: ``bfloat16, frozen, in scaled fp8, on the device``."""
        if self.storage == "cached":
            return "only its cached outputs are used"
        words = [str(self.dtype).removeprefix("torch."), "trained" if self.trained else "frozen"]
        if self.form is not None:
            words.append(f"in {FORMS[self.form].title}")
        if self.storage == "sharded":
            words.append("sharded over the processes")
        places = {
            "device": "on the device",
            "host": "on the host while it is not used",
            "none": "not kept after caching",
        }
        words.append(f"{self.swapped} blocks to swap wait on the host" if self.swapped else places[self.home])
        return ", ".join(words)


@dataclass(frozen=True)
class PlannedStorage:
    """The options on how the parts of a model are kept."""

    forms: Mapping[str, str] = field(default_factory=dict)  # name of a part -> in ``FORMS``
    fp8_matmul: bool = False  # multiply fp8 numbers where layers allow it
    sharded: bool = False  # the denoiser
    blocks_to_swap: int = 0  # of the denoiser
    cached: frozenset[str] = frozenset()  # parts whose outputs come from a cache


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one run."""

    device: torch.device
    parts: Mapping[str, PartPlan]
    fp8_matmul: bool = False

    @staticmethod
    def of(
        device: torch.device,
        *,
        frozen: torch.dtype,
        encoders: Sequence[str],
        denoiser: str,
        vae: str,
        trained: Mapping[str, torch.dtype],
        storage: PlannedStorage,
        vae_dtype: torch.dtype,
        vae_home: Home,
    ) -> MemoryPlan:
        """Make the plan of every part.

        Args:
            frozen: dtype of weights that are not trained.
            encoders: names of the text encoders, in their order.
            trained: dtype of each trained part.
            vae_home: where the VAE is in training.
        """
        parts = {}
        for name in encoders:
            cached = name in storage.cached
            parts[name] = PartPlan(
                name,
                trained.get(name, frozen),
                "cached" if cached else "plain",
                "none" if cached else "device",
                name in trained,
                form=None if cached else storage.forms.get(name),
            )
        swaps = storage.blocks_to_swap
        parts[denoiser] = PartPlan(
            denoiser,
            trained.get(denoiser, frozen),
            "sharded" if storage.sharded else "swapped" if swaps else "plain",
            trained=denoiser in trained,
            swapped=swaps,
            form=storage.forms.get(denoiser),
        )
        parts[vae] = PartPlan(vae, vae_dtype, home=vae_home)
        return MemoryPlan(device, parts, storage.fp8_matmul)

    def __getitem__(self, name: str) -> PartPlan:
        return self.parts[name]

    def loads_on(self, name: str) -> str:
        """Return the device to load a part to: the host, if it is converted before it is moved."""
        part = self.parts[name]
        if part.storage == "cached":
            return "meta"
        return str(self.device) if part.storage == "plain" and part.form is None else "cpu"

    def store(self, name: str, module: nn.Module, blocks: Sequence[Sequence[nn.Module]] = ()) -> None:
        """Convert a loaded part to its form; nothing may be merged into it afterwards.

        Args:
            blocks: the part's lists of repeated blocks, if its family names them.
        """
        part = self.parts[name]
        if part.form is not None:
            from library.memory.stored_layers import store_weights

            store_weights(
                module,
                part.form,
                self.device,
                home="cpu" if part.swapped else None,
                blocks=blocks,
                products_in_fp8=self.fp8_matmul,
            )

    def place(self, name: str, module: nn.Module, blocks: Sequence[Sequence[nn.Module]]) -> Callable[[], None]:
        """Move a part with blocks on the host to its places, after everything that changes whole weights.

        Returns:
            a function that waits until the host can read all its weights, which are copied behind the work.

        Raises:
            UserError: more blocks than can be swapped.
        """
        part = self.parts[name]
        if part.swapped:
            from library.memory.block_stream import stream_blocks

            return stream_blocks(module, blocks, part.swapped, self.device).settle
        return lambda: None

    def rest(self, name: str, module: nn.Module) -> None:
        """Move a part to its home, where it is while it is not used."""
        if self.parts[name].home == "host":
            move(module, "cpu")

    def rows(self) -> list[tuple[str, str]]:
        """Return one row for each part, for tables."""
        return [(f"memory, {part.title}", part.describe()) for part in self.parts.values()]
