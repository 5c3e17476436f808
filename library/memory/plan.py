"""How the parts of a model are kept during a run: dtype, storage and place, decided here and nowhere else.

A plan holds no weights. Loading asks it where a part is loaded to and in which dtype, and lets it give the loaded
modules their final form; the table of ``--dry_run`` prints it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from library.memory.placing import move, on_device

#: plain: in its dtype; fp8: scaled 8-bit numbers; sharded: in pieces over the processes; swapped: some blocks wait on
#: the host; cached: only its outputs are needed, so it has no weights in training
Storage = Literal["plain", "fp8", "sharded", "swapped", "fp8, swapped", "cached"]
#: where a part is between its uses
Home = Literal["device", "host", "none"]


@dataclass(frozen=True)
class PartPlan:
    """How one part is kept in training."""

    name: str  # "denoiser", "text_encoder_1", "vae"
    dtype: torch.dtype  # of its weights, or that they are computed in
    storage: Storage = "plain"
    home: Home = "device"
    trained: bool = False
    swapped: int = 0  # blocks, as asked for

    @property
    def title(self) -> str:
        """Return the name for messages."""
        return "VAE" if self.name == "vae" else self.name.replace("_", " ")

    @property
    def in_fp8(self) -> bool:
        return self.storage.startswith("fp8")

    def describe(self) -> str:
        """Return a description: ``bfloat16, frozen, in scaled fp8, on the device``."""
        if self.storage == "cached":
            return "only its cached outputs are used"
        words = [str(self.dtype).removeprefix("torch."), "trained" if self.trained else "frozen"]
        if self.in_fp8:
            words.append("in scaled fp8")
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

    fp8: frozenset[str] = frozenset()  # names of parts
    sharded: bool = False  # the denoiser
    blocks_to_swap: int = 0  # of the denoiser
    cached: frozenset[str] = frozenset()  # parts whose outputs come from a cache


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one run."""

    device: torch.device
    parts: Mapping[str, PartPlan]

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
            form: Storage = "cached" if cached else "fp8" if name in storage.fp8 else "plain"
            home: Home = "none" if cached else "device"
            parts[name] = PartPlan(name, trained.get(name, frozen), form, home, name in trained)
        swaps = storage.blocks_to_swap
        form = "sharded" if storage.sharded else "plain"
        if denoiser in storage.fp8:
            form = "fp8, swapped" if swaps else "fp8"
        elif swaps:
            form = "swapped"
        parts[denoiser] = PartPlan(
            denoiser, trained.get(denoiser, frozen), form, trained=denoiser in trained, swapped=swaps
        )
        parts[vae] = PartPlan(vae, vae_dtype, home=vae_home)
        return MemoryPlan(device, parts)

    def __getitem__(self, name: str) -> PartPlan:
        return self.parts[name]

    def loads_on(self, name: str) -> str:
        """Return the device to load a part to: the host, if it is converted before it is moved."""
        part = self.parts[name]
        if part.storage == "cached":
            return "meta"
        return str(self.device) if part.storage == "plain" else "cpu"

    def store(self, name: str, module: nn.Module) -> None:
        """Convert a loaded part to its dtype and form; nothing may be merged into it afterwards."""
        part = self.parts[name]
        if part.in_fp8:
            from library.memory.fp8 import store_in_fp8

            store_in_fp8(module, self.device, home="cpu" if part.swapped else None)

    def place(self, name: str, module: nn.Module, blocks: Sequence[Sequence[nn.Module]]) -> None:
        """Move a part with blocks on the host to its places, after everything that changes whole weights.

        Raises:
            UserError: more blocks than can be swapped.
        """
        part = self.parts[name]
        if part.swapped:
            from library.memory.block_stream import stream_blocks

            stream_blocks(module, blocks, part.swapped, self.device)

    def rest(self, name: str, module: nn.Module) -> None:
        """Move a part to its home, where it is while it is not used."""
        if self.parts[name].home == "host":
            move(module, "cpu")

    @contextlib.contextmanager
    def stage(self, models: Mapping[str, nn.Module | None], *names: str) -> Iterator[None]:
        """Have these parts on the device within the context, and each other part that has its home on the host there.

        Args:
            models: the parts by name; those that are not loaded are missing or ``None``.
        """
        for name, module in models.items():
            if module is not None and name not in names:
                self.rest(name, module)
        with contextlib.ExitStack() as staged:
            for name in names:
                module = models.get(name)
                if module is not None:
                    staged.enter_context(on_device(module, self.device))
            yield

    def rows(self) -> list[tuple[str, str]]:
        """Return one row for each part, for tables."""
        return [(f"memory, {part.title}", part.describe()) for part in self.parts.values()]
