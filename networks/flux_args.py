"""The ``--network_args`` of ``networks.lora_flux``, read and checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

from library.architectures.flux.targets import INPUT_LAYERS
from library.errors import UserError
from networks.ggpo import Perturbation
from networks.lora_args import RANK_KEYS, LoraArgs
from networks.network_args import Reader, list_reader, read_bool, read_number, read_rank
from networks.targets import FoundModule, RankAlpha

MODULE_NAME = "networks.lora_flux"

#: keys that give a rank to one kind of layer: key -> pattern of the module's path in a block
LAYER_DIMS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        **{
            f"{stream}_{kind}_dim": re.compile(rf"double_blocks\.\d+\.{stream}_{kind}\.")
            for stream in ("img", "txt")
            for kind in ("attn", "mlp", "mod")
        },
        "single_dim": re.compile(r"single_blocks\.\d+\.linear\d"),
        "single_mod_dim": re.compile(r"single_blocks\.\d+\.modulation\."),
    }
)
BLOCK_KINDS = ("double", "single")
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")

_NO_CONVS = "FLUX.1 has no convolutions; leave it out"
_OTHER_BLOCKS = (
    "it counts the blocks of a U-Net; FLUX.1 has img_attn_dim and the like, train_double_block_indices, "
    "network_reg_dims and network_reg_lrs"
)

_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas"), _NO_CONVS),
        **dict.fromkeys(
            (
                "block_dims", "block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight",
                "block_lr_zero_threshold",
            ),
            _OTHER_BLOCKS,
        ),
    }
)  # fmt: skip


def read_indices(text: str) -> frozenset[int] | None:
    """``0,1,4-7`` -> the numbers, ends included; ``none`` -> no number; ``all`` -> ``None``."""
    word = text.strip().lower()
    if word == "all":
        return None
    if word == "none":
        return frozenset()
    chosen: set[int] = set()
    for piece in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if not found:
            raise ValueError(f'"{piece.strip()}" is no number and no range; give e.g. 0,1,4-7, all or none')
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f'the range "{piece.strip()}" runs backwards')
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def read_blocks(text: str) -> str:
    """``all`` or one of ``BLOCK_KINDS``."""
    word = text.strip().lower()
    if word not in ("all", *BLOCK_KINDS):
        raise ValueError(f"must be all, {' or '.join(BLOCK_KINDS)}")
    return word


def read_in_dims(text: str) -> tuple[int, ...]:
    """``[4,2,2,2,4]``, with or without brackets."""
    return list_reader(read_rank, len(INPUT_LAYERS))(text.strip().removeprefix("[").removesuffix("]"))


def read_strength(text: str) -> float:
    """Read a finite number from 0."""
    value = read_number(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be at least 0")
    return value


@dataclass(frozen=True)
class LoraFluxArgs(LoraArgs):
    """Ranks by kind of layer are in ``layer_dims``, trained blocks by kind in ``blocks_trained``."""

    module_name: ClassVar[str] = MODULE_NAME
    refused: ClassVar[Mapping[str, str]] = _REFUSED
    own_readers: ClassVar[Mapping[str, Reader]] = MappingProxyType(
        {
            **dict.fromkeys(LAYER_DIMS, read_rank),
            "in_dims": read_in_dims,
            **{f"train_{kind}_block_indices": read_indices for kind in BLOCK_KINDS},
            "train_blocks": read_blocks,
            "train_t5xxl": read_bool,
            "split_qkv": read_bool,
            "ggpo_sigma": read_strength,
            "ggpo_beta": read_strength,
            "verbose": read_bool,
        }
    )
    rank_keys: ClassVar[tuple[str, ...]] = (
        *LAYER_DIMS,
        "in_dims",
        *(f"train_{kind}_block_indices" for kind in BLOCK_KINDS),
        "train_blocks",
        "train_t5xxl",
        *(key for key in RANK_KEYS if key not in _REFUSED),
    )

    img_attn_dim: int | None = None
    txt_attn_dim: int | None = None
    img_mlp_dim: int | None = None
    txt_mlp_dim: int | None = None
    img_mod_dim: int | None = None
    txt_mod_dim: int | None = None
    single_dim: int | None = None
    single_mod_dim: int | None = None
    in_dims: tuple[int, ...] = (0,) * len(INPUT_LAYERS)
    train_double_block_indices: frozenset[int] | None = None  # all
    train_single_block_indices: frozenset[int] | None = None
    train_blocks: str = "all"
    train_t5xxl: bool = False
    split_qkv: bool | None = None  # None: no, but a file may decide
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None
    verbose: bool = False
    dims_by_layer: Mapping[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in LAYER_DIMS if getattr(self, key) is not None}
        object.__setattr__(self, "dims_by_layer", given)
        problems = []
        if (self.ggpo_sigma is None) != (self.ggpo_beta is None):
            one, other = ("ggpo_sigma", "ggpo_beta") if self.ggpo_beta is None else ("ggpo_beta", "ggpo_sigma")
            problems.append(f"--network_args {one} needs {other} beside it; 0 leaves its part out")
        for key in ("split_qkv", "ggpo_sigma"):
            if self.dora and getattr(self, key):
                problems.append(f"--network_args {key} and dora=True exclude each other; leave one out")
        for kind in BLOCK_KINDS:
            if self.train_blocks in ("all", kind):
                continue
            key = f"train_{kind}_block_indices"
            if getattr(self, key):
                problems.append(
                    f"--network_args train_blocks={self.train_blocks} and {key} exclude each other; leave one out"
                )
            object.__setattr__(self, key, frozenset())
        if problems:
            raise UserError("\n".join(problems))

    @property
    def perturbation(self) -> Perturbation | None:
        """Return GGPO's settings, if it changes anything."""
        if not self.ggpo_sigma and not self.ggpo_beta:
            return None
        return Perturbation(self.ggpo_sigma or 0.0, self.ggpo_beta or 0.0)

    def check_model(self, found: Collection[FoundModule], input_layers: Collection[str]) -> None:
        """Compare the args with a model.

        Args:
            found: its modules that may be adapted.
            input_layers: those of ``INPUT_LAYERS`` that it has.

        Raises:
            UserError: blocks or layers that the model does not have.
        """
        paths = [module.path for module in found]
        problems = []
        for kind in BLOCK_KINDS:
            chosen, count = getattr(self, f"train_{kind}_block_indices"), _count(paths, kind)
            if chosen and max(chosen) >= count:
                problems.append(
                    f"--network_args train_{kind}_block_indices: {max(chosen)} is out of range; the model has {count} "
                    f"{kind} blocks, 0-{count - 1}"
                )
        for name, rank in zip(INPUT_LAYERS, self.in_dims, strict=True):
            if rank and name not in input_layers:
                problems.append(
                    f"--network_args in_dims: the model has no {name}; give 0 in its place (the order is "
                    f"{', '.join(INPUT_LAYERS)})"
                )
        for key, rank in self.dims_by_layer.items():
            if rank and not any(LAYER_DIMS[key].match(path) for path in paths):
                problems.append(f"--network_args {key} has no effect: the model has no such layers; leave it out")
        if problems:
            raise UserError("\n".join(problems))

    def size_of(self, found: FoundModule, rank: int, alpha: float, *, in_unet: bool) -> RankAlpha | None:
        block = _BLOCK.match(found.path) if in_unet else None
        if block:
            chosen = getattr(self, f"train_{block[1]}_block_indices")
            if chosen is not None and int(block[2]) not in chosen:
                return None
        size = super().size_of(found, rank, alpha, in_unet=in_unet)
        if size is None or not self.split_qkv or not found.widths:
            return size
        count = len(found.widths)
        return replace(size, rank=size.rank * count, alpha=size.alpha * count, widths=found.widths)

    def _size_in_unet(self, found: FoundModule, rank: int, alpha: float, block: int | None) -> tuple[int, float]:
        layer = found.path.partition(".")[0]
        if layer in INPUT_LAYERS:
            return self.in_dims[INPUT_LAYERS.index(layer)], alpha
        for key, own in self.dims_by_layer.items():
            if LAYER_DIMS[key].match(found.path):
                return own, alpha
        return rank, alpha


def _count(paths: Iterable[str], kind: str) -> int:
    """Return the number of blocks of a kind in a model with these module paths."""
    return max((int(b[2]) + 1 for path in paths if (b := _BLOCK.match(path)) and b[1] == kind), default=0)
