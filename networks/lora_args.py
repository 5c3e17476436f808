"""Read and check the ``--network_args`` of ``networks.lora``; other adapters accept them or refuse them with the
reason."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from library.architectures.lora_target import BlockNumbering
from library.architectures.network_args import (
    PatternValues,
    Reader,
    list_reader,
    patterns_reader,
    rates_reader,
    read_bool,
    read_network_args,
    read_number,
    read_positive,
    read_probability,
    read_rank,
    read_rate,
)
from library.errors import UserError
from networks.adapter_module import Dropouts
from networks.targets import DoraAxis, FoundModule, RankAlpha
from networks.unet_blocks import SD_BLOCKS, unet_block_index

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from typing_extensions import Self

MODULE_NAME = "networks.lora"
DEFAULT_ALPHA = 1.0


def _readers(blocks: BlockNumbering) -> dict[str, Reader]:
    count = blocks.count
    return {
        "conv_dim": read_rank,
        "conv_alpha": read_number,
        "dropout": read_probability,  # trainers of the published protocol pass --network_dropout here as well
        "rank_dropout": read_probability,
        "module_dropout": read_probability,
        "loraplus_lr_ratio": read_positive,
        "loraplus_unet_lr_ratio": read_positive,
        "loraplus_text_encoder_lr_ratio": read_positive,
        "block_dims": list_reader(read_rank, count),
        "block_alphas": list_reader(read_number, count),
        "conv_block_dims": list_reader(read_rank, count),
        "conv_block_alphas": list_reader(read_number, count),
        "down_lr_weight": rates_reader(blocks.down),
        "mid_lr_weight": list_reader(read_number, blocks.mid),
        "up_lr_weight": rates_reader(blocks.up),
        "block_lr_zero_threshold": read_number,
        "network_reg_dims": patterns_reader(read_rank),
        "network_reg_lrs": patterns_reader(read_rate),
        "rs_lora": read_bool,
        "dora": read_bool,
        "dora_on_output": read_bool,
    }


#: keys that a weights file decides
RANK_KEYS = (
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "network_reg_dims",
    "rs_lora", "dora", "dora_on_output",
)  # fmt: skip
#: alpha / rank below which a warning says that training is slow
_WEAK = 0.1
_BLOCK_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


@dataclass(frozen=True)
class LoraArgs:
    """The parsed network args. Block values are by block number; ``None`` if not given."""

    module_name: ClassVar[str] = MODULE_NAME
    #: keys of ``networks.lora`` that a subclass refuses, with the reason
    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: keys that only a subclass has
    own_readers: ClassVar[Mapping[str, Reader]] = MappingProxyType({})
    #: keys that a weights file answers
    rank_keys: ClassVar[tuple[str, ...]] = RANK_KEYS

    dropout: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    conv_dim: int | None = None
    conv_alpha: float = DEFAULT_ALPHA
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_lr_weights: tuple[float, ...] | None = None
    block_lr_zero_threshold: float = 0.0
    network_reg_dims: PatternValues = PatternValues()
    network_reg_lrs: PatternValues = PatternValues()
    rs_lora: bool = False
    dora: bool = False
    dora_on_output: bool = False
    blocks: BlockNumbering = SD_BLOCKS

    @classmethod
    def read(cls, given: Mapping[str, object], blocks: BlockNumbering | None = None) -> Self:
        """Args: ``blocks`` of the U-Net; those of SD 1.x/2.x, if not given.

        Raises:
            UserError: unknown keys, wrong values and keys that would have no effect.
        """
        blocks = blocks or SD_BLOCKS
        readers = {key: reader for key, reader in _readers(blocks).items() if key not in cls.refused}
        values = read_network_args(given, {**readers, **cls.own_readers}, cls.module_name, cls.refused)
        problems = []
        if "conv_dim" not in values and "conv_block_dims" not in values:
            problems += [
                f"--network_args {key} has no effect without conv_dim or conv_block_dims"
                for key in ("conv_alpha", "conv_block_alphas")
                if key in values
            ]
        if values.get("dora_on_output") and not values.get("dora"):
            problems.append("--network_args dora_on_output has no effect without dora=True")
        rates = [values.pop(key, None) for key in _BLOCK_RATES]
        if any(rate is not None for rate in rates):
            down, mid, up = rates
            ends = (1.0,) * blocks.ends
            down, mid, up = (
                given_rates or (1.0,) * count
                for given_rates, count in ((down, blocks.down), (mid, blocks.mid), (up, blocks.up))
            )
            values["block_lr_weights"] = ends + down + mid + up + ends
        elif "block_lr_zero_threshold" in values:
            needed = ", ".join(_BLOCK_RATES)
            problems.append(f"--network_args block_lr_zero_threshold has no effect without one of {needed}")
        if problems:
            raise UserError("\n".join(problems))
        return cls(**cls.own_values(values), blocks=blocks)

    @classmethod
    def own_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values as fields of this class, where a subclass has other fields than keys."""
        return values

    @property
    def adapts_spatial_convs(self) -> bool:
        return bool(self.conv_dim) or any(self.conv_block_dims or ())

    def check_size(self, rank: int, alpha: float) -> None:
        """Check ``--network_dim`` and ``--network_alpha``. Raises UserError."""
        if rank < 1:
            raise UserError(f"--network_dim {rank}: the rank must be at least 1")
        if 0 < alpha < _WEAK * rank and not self.rs_lora:  # 0 stands for the rank
            logger.warning(
                "--network_alpha %g with --network_dim %d: acts at %.3g of the learned strength, so training is slow; "
                "half the rank is common (docs/first_lora.md)",
                *(alpha, rank, alpha / rank),
            )

    def dropouts(self, neuron_dropout: float | None) -> Dropouts:
        neuron = self.dropout if neuron_dropout is None else neuron_dropout
        if neuron is not None and not 0 <= neuron < 1:
            raise UserError(f"--network_dropout {neuron}: must be at least 0 and less than 1")
        return Dropouts(neuron or 0.0, self.rank_dropout, self.module_dropout)

    def size_of(self, found: FoundModule, rank: int, alpha: float, *, in_unet: bool) -> RankAlpha | None:
        """Return rank and alpha of a module, given the network's; ``None`` skips it."""
        if in_unet:
            by_block = (self.block_dims, self.block_alphas, self.conv_block_dims, self.conv_block_alphas)
            block = 0  # of no interest without values by block
            if self.block_lr_weights is not None or any(values is not None for values in by_block):
                block = unet_block_index(found.path, self.blocks)
            if self.block_lr_weights is not None and self.block_lr_weights[block] <= self.block_lr_zero_threshold:
                return None
            rank, alpha = self._size_in_unet(found, rank, alpha, block)
        own = self.network_reg_dims.value_of(found.lora_name)
        rank = rank if own is None else own
        if not rank:
            return None
        alpha = float(alpha or rank)  # an alpha of 0 stands for the rank, so that the scale is 1
        axis: DoraAxis = "output" if self.dora_on_output else "input"
        return RankAlpha(rank, alpha * math.sqrt(rank) if self.rs_lora else alpha, axis if self.dora else None)

    def _size_in_unet(self, found: FoundModule, rank: int, alpha: float, block: int) -> tuple[int, float]:
        if found.is_spatial_conv:
            rank = self.conv_dim or 0 if self.conv_block_dims is None else self.conv_block_dims[block]
            alpha = self.conv_alpha if self.conv_block_alphas is None else self.conv_block_alphas[block]
        else:
            rank = rank if self.block_dims is None else self.block_dims[block]
            alpha = alpha if self.block_alphas is None else self.block_alphas[block]
        return rank, alpha

    def loraplus_ratio(self, is_text_encoder: bool) -> float | None:
        own = self.loraplus_text_encoder_lr_ratio if is_text_encoder else self.loraplus_unet_lr_ratio
        return self.loraplus_lr_ratio if own is None else own
