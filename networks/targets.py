"""Find the modules of a model that carry adapters, and their names in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from library.architectures.lora_target import LORA_TARGET, LoraTarget
from library.errors import UserError

#: the features that have magnitudes in a DoRA
DoraAxis = Literal["input", "output"]


@dataclass(frozen=True)
class RankAlpha:
    """The size of one adapter; its strength is alpha / rank."""

    rank: int
    alpha: float
    dora: DoraAxis | None = None  # None for a plain LoRA
    widths: tuple[int, ...] = ()  # output features of the parts of a split adapter; their ranks are equal


@dataclass(frozen=True)
class FoundModule:
    """A module that may carry an adapter."""

    lora_name: str
    path: str  # dotted, in its model
    module: nn.Module
    published_path: str = ""  # the same in diffusers' files
    widths: tuple[int, ...] = ()  # output features of the projections that are stacked in it; () where it is one

    @property
    def is_spatial_conv(self) -> bool:
        """Whether it is a convolution with a kernel larger than 1x1, which has its own rank."""
        return isinstance(self.module, nn.Conv2d) and self.module.kernel_size != (1, 1)


#: a rank this many times the features of a module is a mistake; a matrix has at most the rank of its smaller side
_RANK_LIMIT = 100


def check_rank(found: FoundModule, rank: int) -> None:
    """Raise UserError for an absurdly large rank."""
    features = max(found.module.weight.shape[:2])
    if rank > _RANK_LIMIT * features:
        raise UserError(
            f"{found.lora_name}: rank {rank:,} for a layer of {features:,} features; --network_dim and the ranks in "
            "--network_args are usually 4 to 128, and more than the features of a layer is of no use"
        )


RankRule = Callable[[FoundModule], RankAlpha | None]


def find_modules(model: nn.Module, target: LoraTarget) -> Iterator[FoundModule]:
    """Return the ``Linear`` and ``Conv2d`` modules inside the target's classes and paths, once each, in the model's
    order."""
    seen: set[str] = set()
    # transformers 5 dropped the "text_model." level from CLIPTextModel; files keep it
    is_short_clip = type(model).__name__.startswith("CLIPTextModel") and not hasattr(model, "text_model")
    level = "text_model." if is_short_clip else ""
    for owner_path, owner in model.named_modules():
        if type(owner).__name__ not in target.module_classes and owner_path not in target.module_paths:
            continue
        for inner_path, module in owner.named_modules(prefix=owner_path):
            if isinstance(module, (nn.Linear, nn.Conv2d)) and inner_path not in seen:
                seen.add(inner_path)
                path = level + inner_path
                in_files = path if target.file_path is None else target.file_path(path)
                assert in_files is not None, f"no name for {path} in files"
                widths = () if target.stacked_widths is None else target.stacked_widths(inner_path, module)
                yield FoundModule(f"{target.prefix}.{in_files}".replace(".", "_"), inner_path, module, path, widths)


def target_of(model: nn.Module, default: LoraTarget) -> LoraTarget:
    """Return the adapter target of a model; ``default`` for models that no family has loaded."""
    return getattr(model, LORA_TARGET, default)
