"""DyLoRA for SD 1.x, 2.x and SDXL (``--network_module networks.dylora``): one training for all ranks up to its own.

Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation" (arXiv:2210.07558), algorithm 1, in its frozen form. Each step draws a random rank b; the forward pass uses
the first b ranks,

    W x + (alpha / b) U[:, :b] D[:b] x,

and the step trains the last ``unit`` of them; lower ranks are frozen. So the first ranks learn what matters most, and
the first k of them are a LoRA of rank k with the same alpha: ``networks/extract_lora_from_dylora.py`` extracts it.
Validation, sample images and ``gen_img.py`` use all ranks.

The rank is the same in all modules of a step and a function of the run's seed and the step, so a resumed run draws the
same. Without this project's trainer nothing is drawn: the network trains all ranks, as a LoRA.

Files have the names and shapes of ``networks.lora``, which reads them, too. On SDXL the text encoders are ``lora_te1``
and ``lora_te2``. Old files have ``lora_te`` for both, where the modules of the second have overwritten those of the
first: they are read with a warning, as a file without the first.

Network args: ``unit``, ranks that are trained together (1; it divides the rank); those of ``networks.lora`` without
different ranks for different modules, rs-LoRA, DoRA and ``rank_dropout``. ``conv_dim`` must be the network's rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from library.architectures.network_args import Reader, read_rank
from library.errors import UserError
from library.randomness import python_rng
from networks.adapter_module import Dropouts
from networks.base import NetworkPart
from networks.lora import LoraNetwork
from networks.lora_args import LoraArgs
from networks.lora_in_pieces import LoraInPieces
from networks.targets import FoundModule, RankAlpha, find_modules

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

MODULE_NAME = "networks.dylora"

#: prefix of both text encoders' modules in old files of SDXL
OLD_TEXT_PREFIX = "lora_te_"

_ONE_RANK = "each step cuts all modules to the same rank; leave it out"
_NO_DORA = "networks.lora has it"


def read_unit(text: str) -> int:
    """Read a whole number from 1."""
    value = read_rank(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


@dataclass(frozen=True)
class DyLoraArgs(LoraArgs):
    """``unit``: ranks that are trained together."""

    module_name: ClassVar[str] = MODULE_NAME
    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "block_dims": _ONE_RANK,
            "conv_block_dims": _ONE_RANK,
            "network_reg_dims": _ONE_RANK,
            "rank_dropout": "it leaves ranks out by itself; leave it out, or use --network_dropout",
            "rs_lora": "its strength is alpha / the rank of the step; leave it out",
            "dora": _NO_DORA,
            "dora_on_output": _NO_DORA,
        }
    )
    own_readers: ClassVar[Mapping[str, Reader]] = MappingProxyType({"unit": read_unit})

    unit: int = 1

    def check_size(self, rank: int, alpha: float) -> None:
        """Check sizes as in the base class; the unit must divide the rank."""
        super().check_size(rank, alpha)
        if self.conv_dim and self.conv_dim != rank:
            raise UserError(
                f"--network_args conv_dim={self.conv_dim}: {MODULE_NAME} cuts all modules to the same rank in a step; "
                f"make it --network_dim, {rank}, or leave it out"
            )
        if rank % self.unit:
            raise UserError(
                f"--network_args unit={self.unit}: must divide the rank, {rank}; choose another, or another "
                "--network_dim"
            )


class DyLoraModule(LoraInPieces):
    """Low-rank change of one ``Linear`` or ``Conv2d`` in blocks of ranks.

    Its pieces are ``down_0`` (unit, in[, kh, kw]), ``up_0`` (out, unit[, 1, 1]), ``down_1``, ...: separate parameters,
    so that an optimizer skips those that a step does not train.
    """

    def __init__(
        self,
        found: FoundModule,
        size: RankAlpha,
        *,
        unit: int,
        multiplier: float = 1.0,
        dropouts: Dropouts = Dropouts(),
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        if size.rank % unit:
            raise UserError(f"--network_args unit={unit}: must divide the rank, {size.rank} in {found.lora_name}")
        self.unit = unit
        self.blocks = size.rank // unit
        #: the trained block, with those before it in use; None uses and trains all
        self._block: int | None = None
        self.take_apart(self.lora_down.weight.split(unit, dim=0), self.lora_up.weight.split(unit, dim=1))

    # ---- one step ----

    def train_block(self, block: int) -> None:
        """Use the ranks up to a block (counted from 0; the last, if there are fewer) and train only that block."""
        block = min(block, self.blocks - 1)
        if block == self._block:
            return
        # after the first call only two blocks change; there may be thousands of modules and blocks
        changed = range(self.blocks) if self._block is None else (self._block, block)
        for number in changed:
            for half in ("down", "up"):
                self._parameters[f"{half}_{number}"].requires_grad_(self.trained and number == block)
        self._block = block

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set requires_grad as for every module; all blocks are in use until the next step begins."""
        self._block = None
        return super().requires_grad_(requires_grad)

    @property
    def _count_in_use(self) -> int:
        """Return the number of blocks in use: all, except in training."""
        return self._block + 1 if self.training and self._block is not None else self.blocks

    @property
    def scale_in_use(self) -> float:
        return self.scale * self.blocks / self._count_in_use

    def halves(self) -> tuple[Tensor, Tensor]:
        return self._joined(self.blocks)

    def halves_in_use(self) -> tuple[Tensor, Tensor]:
        return self._joined(self._count_in_use)

    def _joined(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.cat(self.pieces("down")[:count]), torch.cat(self.pieces("up")[:count], dim=1)

    # ---- states and files ----

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        split = dict(state_dict)
        for half, axis in (("down", 0), ("up", 1)):
            joined = split.pop(f"{prefix}lora_{half}.weight", None)
            if joined is None or joined.shape[axis] != self.rank:
                continue  # reported as missing
            for number, piece in enumerate(joined.split(self.unit, dim=axis)):
                split[f"{prefix}{half}_{number}"] = piece
        super()._load_from_state_dict(split, prefix, *args, **kwargs)


class DyLoraNetwork(LoraNetwork):
    """DyLoRA on text encoders and a denoiser."""

    module_name = MODULE_NAME
    args_class = DyLoraArgs
    args: DyLoraArgs

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> DyLoraModule:
        return DyLoraModule(found, size, unit=self.args.unit, **settings)

    def begin_step(self, seed: int, step: int) -> None:
        """Draw the step's rank uniformly, for all modules."""
        most = max(adapter.blocks for adapter in self.adapters)
        block = python_rng(seed, "dylora", step).randrange(most)
        for adapter in self.adapters:
            adapter.train_block(block)

    @classmethod
    def names_in(cls, parts: Sequence[NetworkPart], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return super().names_in(parts, with_encoders_apart(parts, weights))


def with_encoders_apart(parts: Sequence[NetworkPart], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of an old file under the name of the last text encoder whose shapes fit.

    Other files are returned unchanged; old files cause a warning.
    """
    encoders = [part for part in parts if part.is_text_encoder]
    if len(encoders) < 2 or not any(key.startswith(OLD_TEXT_PREFIX) for key in weights):
        return weights
    renamed: dict[str, str] = {}  # old name of a module -> new
    for part in encoders:
        for found in find_modules(part.model, part.target):
            old = OLD_TEXT_PREFIX + found.lora_name.removeprefix(f"{part.target.prefix}_")
            down, up = weights.get(f"{old}.lora_down.weight"), weights.get(f"{old}.lora_up.weight")
            shape = found.module.weight.shape
            if down is not None and up is not None and (up.shape[0], *down.shape[1:]) == tuple(shape):
                renamed[old] = found.lora_name
    for part in encoders:
        if count := sum(new.startswith(f"{part.target.prefix}_") for new in renamed.values()):
            others = ", ".join(other.label for other in encoders if other is not part)
            logger.warning(
                "an old DyLoRA file, with one name (lora_te) for several text encoders; the last one overwrote "
                "the others: its %d modules are those of %s (%s) by their shapes; what was trained of %s is lost",
                *(count, part.label, part.target.prefix, others),
            )
    keys = ((key, *key.partition(".")[::2]) for key in weights)
    return {f"{renamed[name]}.{tensor}" if name in renamed else key: weights[key] for key, name, tensor in keys}


check_network_args = DyLoraNetwork.check_network_args
create_network = DyLoraNetwork.create
create_network_from_weights = DyLoraNetwork.create_from_weights
