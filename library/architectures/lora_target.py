"""The modules of a model that carry adapters, and their names in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class BlockNumbering:
    """The lengths of lists by U-Net block: down, middle and up blocks in this order, with ``ends`` before and after."""

    down: int
    mid: int  # 1: the middle block as a whole; 3: ResNet, attention, ResNet
    up: int
    ends: int = 0  # numbers before the first and after the last block, of parts that carry no adapters

    @property
    def count(self) -> int:
        return self.down + self.mid + self.up + 2 * self.ends


@dataclass(frozen=True)
class LoraTarget:
    """The modules of one model that carry adapters, and their names in files."""

    prefix: str  # "lora_unet", "lora_te", "lora_te1"
    module_classes: tuple[str, ...]  # class names whose Linear and Conv2d children are adapted
    conv_classes: tuple[str, ...] = ()  # further classes, for networks that adapt 3x3 convolutions too
    blocks: BlockNumbering | None = None  # of a U-Net
    #: module path -> path in files, where they differ
    file_path: Callable[[str], str | None] | None = None
    diffusers_root: str = ""  # prefix of module paths in files of diffusers and PEFT: "unet"
    attention_classes: tuple[str, ...] = ()  # class names of the attention layers within ``module_classes``
    #: paths of further modules whose ``Linear`` layers are adapted
    module_paths: tuple[str, ...] = ()
    #: (path, layer) -> output widths of the projections stacked in a layer; () for a single projection
    stacked_widths: Callable[[str, nn.Module], tuple[int, ...]] | None = None
    #: the family's own network modules, LoRA first, where the modules for U-Nets do not adapt it
    network_modules: tuple[str, ...] = ()
    #: other models whose modules have the same names: (``ss_base_model_version`` of their adapters, name for people)
    namesakes: tuple[tuple[str, str], ...] = ()
    #: endings of modules' names in other programs' files, and those of the published names
    other_endings: tuple[tuple[str, str], ...] = ()

    def with_convs(self) -> LoraTarget:
        return replace(self, module_classes=self.module_classes + self.conv_classes)


#: attribute of a loaded model that holds its ``LoraTarget``
LORA_TARGET = "lora_target"
