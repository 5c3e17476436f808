"""The ``--network_args`` of LoRAs of transformers, as a family's ``LoraTable`` has them, read and checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

from library.architectures.lora_table import BlockList, LoraTable
from library.architectures.network_args import Reader, list_reader, read_bool, read_number, read_rank
from library.errors import UserError
from networks.ggpo import Perturbation
from networks.lora_args import RANK_KEYS, LoraArgs
from networks.targets import FoundModule, RankAlpha

#: keys of ``networks.lora`` that only a U-Net has a use for
_CONV_KEYS = ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas")
_BLOCK_KEYS = (
    "block_dims", "block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
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


def word_reader(words: Collection[str]) -> Reader:
    """Return a reader of ``all`` or one of the words."""

    def read(text: str) -> str:
        word = text.strip().lower()
        if word not in ("all", *words):
            raise ValueError(f"must be all, {' or '.join(words)}")
        return word

    return read


def ranks_reader(count: int) -> Reader:
    """Return a reader of ``[4,2,2,2,4]``, with or without brackets."""
    read = list_reader(read_rank, count)
    return lambda text: read(text.strip().removeprefix("[").removesuffix("]"))


def read_strength(text: str) -> float:
    """Read a finite number from 0."""
    value = read_number(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be at least 0")
    return value


def refused_by(table: LoraTable) -> Mapping[str, str]:
    """Return the keys of ``networks.lora`` that the family cannot do, and why."""
    blocks = f"it counts the blocks of a U-Net; {table.title} has {table.instead}"
    convs = f"{table.title} has no convolutions; leave it out"
    return MappingProxyType({**dict.fromkeys(_CONV_KEYS, convs), **dict.fromkeys(_BLOCK_KEYS, blocks)})


def _rank_readers(table: LoraTable) -> dict[str, Reader]:
    """Return the readers of what a file of weights decides by itself."""
    readers: dict[str, Reader] = dict.fromkeys(table.layers, read_rank)
    if table.embedders_key:
        readers[table.embedders_key] = ranks_reader(len(table.embedders))
    readers |= {one.key: read_indices for one in table.blocks if one.key}
    if table.choice_key:
        readers[table.choice_key] = word_reader(table.choices)
    return readers | dict.fromkeys(table.encoders, read_bool)


@dataclass(frozen=True)
class TransformerArgs(LoraArgs):
    """The network args of one family; classes of families are made by ``args_class``.

    Attributes:
        layer_dims: ranks of kinds of layers, by key.
        blocks_trained: numbers of the blocks that are adapted, by kind of list; None for all.
        embedder_dims: in the order of the table.
        encoders_on: prefixes of text encoders that are adapted, of those that have a key.
        split_qkv: None: no, but a file may decide.
    """

    table: ClassVar[LoraTable]

    layer_dims: Mapping[str, int] = field(default_factory=dict)
    blocks_trained: Mapping[str, frozenset[int] | None] = field(default_factory=dict)
    embedder_dims: tuple[int, ...] = ()
    encoders_on: frozenset[str] = frozenset()
    split_qkv: bool | None = None
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None
    verbose: bool = False

    @classmethod
    def own_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the table's keys as fields of this class. Raises UserError for keys that exclude each other."""
        table, problems = cls.table, []
        choice = values.pop(table.choice_key, "all")
        kinds = None if choice == "all" else table.choices[choice]
        trained: dict[str, frozenset[int] | None] = {}
        for one in table.blocks:
            chosen = values.pop(one.key, None)
            if kinds is not None and one.kind not in kinds:
                if chosen:
                    problems.append(
                        f"--network_args {table.choice_key}={choice} and {one.key} exclude each other; leave one out"
                    )
                chosen = frozenset()
            trained[one.kind] = chosen
        if problems:
            raise UserError("\n".join(problems))
        layers = {key: values.pop(key) for key in table.layers if key in values}
        encoders = frozenset(prefix for key, prefix in table.encoders.items() if values.pop(key, False))
        embedders = values.pop(table.embedders_key, (0,) * len(table.embedders))
        own = {"layer_dims": layers, "blocks_trained": trained, "embedder_dims": embedders, "encoders_on": encoders}
        return {**values, **own}

    def __post_init__(self) -> None:
        problems = []
        if (self.ggpo_sigma is None) != (self.ggpo_beta is None):
            one, other = ("ggpo_sigma", "ggpo_beta") if self.ggpo_beta is None else ("ggpo_beta", "ggpo_sigma")
            problems.append(f"--network_args {one} needs {other} beside it; 0 leaves its part out")
        for key in ("split_qkv", "ggpo_sigma"):
            if self.dora and getattr(self, key):
                problems.append(f"--network_args {key} and dora=True exclude each other; leave one out")
        if problems:
            raise UserError("\n".join(problems))

    @property
    def perturbation(self) -> Perturbation | None:
        """Return GGPO's settings, if it changes anything."""
        if not self.ggpo_sigma and not self.ggpo_beta:
            return None
        return Perturbation(self.ggpo_sigma or 0.0, self.ggpo_beta or 0.0)

    def check_model(self, found: Collection[FoundModule], embedders: Collection[str]) -> None:
        """Compare the args with a model.

        Args:
            found: its modules that may be adapted.
            embedders: those of the table that it has.

        Raises:
            UserError: blocks or layers that the model does not have.
        """
        table = self.table
        paths = [module.path for module in found]
        problems = []
        for one in table.blocks:
            chosen, count = self.blocks_trained.get(one.kind), _count(paths, one)
            if chosen and max(chosen) >= count:
                problems.append(
                    f"--network_args {one.key}: {max(chosen)} is out of range; the model has {count} "
                    f"{one.kind} blocks, 0-{count - 1}"
                )
        for name, rank in zip(table.embedders, self.embedder_dims, strict=True):
            if rank and name not in embedders:
                problems.append(
                    f"--network_args {table.embedders_key}: the model has no {name}; give 0 in its place (the order is "
                    f"{', '.join(table.embedders)})"
                )
        for key, rank in self.layer_dims.items():
            if rank and not any(table.layers[key].match(path) for path in paths):
                problems.append(f"--network_args {key} has no effect: the model has no such layers; leave it out")
        if problems:
            raise UserError("\n".join(problems))

    def size_of(self, found: FoundModule, rank: int, alpha: float, *, in_unet: bool) -> RankAlpha | None:
        if in_unet and not self._is_trained(found.path):
            return None
        size = super().size_of(found, rank, alpha, in_unet=in_unet)
        if size is None or not self.split_qkv or not found.widths:
            return size
        count = len(found.widths)
        return replace(size, rank=size.rank * count, alpha=size.alpha * count, widths=found.widths)

    def _is_trained(self, path: str) -> bool:
        """Whether the block that a module is in, if any, is adapted."""
        for one in self.table.blocks:
            chosen = self.blocks_trained.get(one.kind)
            if block := one.path.match(path):
                return chosen is None or int(block[1]) in chosen
            if one.also is not None and one.also.match(path):
                return chosen is None or bool(chosen)
        return True

    def _size_in_unet(self, found: FoundModule, rank: int, alpha: float, block: int | None) -> tuple[int, float]:
        for layer, own in zip(self.table.embedders, self.embedder_dims, strict=True):
            if found.path == layer or found.path.startswith(f"{layer}."):
                return own, alpha
        for key, own in self.layer_dims.items():
            if self.table.layers[key].match(found.path):
                return own, alpha
        return rank, alpha


def _count(paths: Iterable[str], blocks: BlockList) -> int:
    """Return the number of blocks of a list in a model with these module paths."""
    return max((int(found[1]) + 1 for path in paths if (found := blocks.path.match(path))), default=0)


def args_class(table: LoraTable, module: str) -> type[TransformerArgs]:
    """Return the class of the network args of one family's network module."""
    rank_readers, refused = _rank_readers(table), refused_by(table)
    own: dict[str, Reader] = {**rank_readers, "verbose": read_bool}
    if table.splits:
        own["split_qkv"] = read_bool
    if table.perturbs:
        own |= {"ggpo_sigma": read_strength, "ggpo_beta": read_strength}
    attributes = {
        "table": table,
        "module_name": module,
        "refused": refused,
        "own_readers": MappingProxyType(own),
        "rank_keys": (*rank_readers, *(key for key in RANK_KEYS if key not in refused)),
        "__doc__": f"The network args of ``{module}``.",
    }
    return type("FamilyArgs", (TransformerArgs,), attributes)
