"""Adapter files to merge: modules by published names, each file with its strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.architectures.adapters import AdapterFamily
from networks.files.adapter_file import DORA, DOWN, LORA_TENSORS, UP, Module, read_adapter
from networks.files.block_weights import BlockWeights
from networks.files.reshape import to_original


@dataclass(frozen=True)
class LoraFile:
    """One file to merge.

    Attributes:
        ratio: the strength it is merged with.
        modules: with published names; parts of joint modules are joined.
        is_diffusers: whether the names in the file are diffusers'.
        blocks: factors of the strength for each block of the denoiser; None for none.
    """

    path: Path
    ratio: float
    family: AdapterFamily
    modules: Mapping[str, Module]
    metadata: Mapping[str, str]
    is_diffusers: bool
    blocks: BlockWeights | None = None

    @staticmethod
    def open(
        path: Path, ratio: float, family: AdapterFamily | None = None, blocks: BlockWeights | None = None
    ) -> LoraFile:
        """Read a file.

        Args:
            family: None detects it.

        Raises:
            UserError: missing, damaged, or no adapter for the family.
        """
        file = read_adapter(path, family)
        modules = {published_name(module): module for module in to_published(file.modules, str(path))}
        is_diffusers = any(module.space == "diffusers" for module in file.modules)
        return LoraFile(path, ratio, file.family, modules, file.metadata, is_diffusers, blocks)

    def strength(self, name: str) -> float:
        """Return the factor for the change of a module."""
        return self.ratio * (1.0 if self.blocks is None else self.blocks.of(name))


def to_published(modules: list[Module], title: str) -> list[Module]:
    """Return the modules with the paths of published names; these are the original paths unless a family says
    otherwise."""
    kept = [module for module in modules if module.part.published == "diffusers" and module.space == "diffusers"]
    others = [module for module in modules if not any(module is one for one in kept)]
    return [*kept, *to_original(others, title)]


def published_name(module: Module) -> str:
    """Return the name in files, from a path in either space."""
    part, path = module.part, module.path
    if module.space != part.published:
        if part.published == "diffusers":
            path = part.paths.to_diffusers(path)[0]
        else:
            place = part.paths.to_original(path)
            assert place is not None, path
            path = place.path
    return part.name("kohya", path)


def is_plain(module: Module) -> bool:
    """Whether a module is a LoRA of two halves and nothing else."""
    names = module.tensors.keys()
    return {DOWN, UP} <= names <= LORA_TENSORS - {DORA}
