"""OFT for FLUX.1 and Chroma (``--network_module networks.oft_flux``): output features of the transformer are rotated.

The algebra is that of ``networks/oft.py``. A layer in which projections are stacked (query, key and value; in
``linear1`` the MLP's first half too) has a rotation for each of them, in ``--network_dim`` blocks each, every one
bounded by |Q_i| <= alpha * its output features. Files hold ``oft_unet_<module>.oft_blocks.0``, ``.1``, ...
(n, width / n, width / n), in the order of the projections, and ``.alpha``.

It adapts the attention layers of the double-stream blocks; with ``enable_all_linear=True`` all linear layers of all
blocks. The other network args are ``module_dropout``, ``network_reg_dims`` and ``network_reg_lrs``. The text encoders
are not adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.architectures.base import LoraTarget
from library.architectures.flux.targets import DENOISER
from library.errors import UserError
from networks.adapter_module import AdapterModule, Dropouts
from networks.flux_args import LoraFluxArgs
from networks.network_args import Reader, read_bool
from networks.oft import OftArgs, OftNetwork, generator_of, moved_by
from networks.own_product import own_product
from networks.targets import FoundModule, RankAlpha

MODULE_NAME = "networks.oft_flux"


@dataclass(frozen=True)
class OftFluxArgs(OftArgs):
    """``enable_all_linear`` adapts more than the attentions' layers."""

    module_name: ClassVar[str] = MODULE_NAME
    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**OftArgs.refused, **LoraFluxArgs.refused, "enable_conv": LoraFluxArgs.refused["conv_dim"]}
    )
    own_readers: ClassVar[Mapping[str, Reader]] = MappingProxyType({"enable_all_linear": read_bool})
    rank_keys: ClassVar[tuple[str, ...]] = ("enable_all_linear", "network_reg_dims")


class OftFluxModule(AdapterModule):
    """Rotations of the output features of the projections in one ``Linear``; ``oft_blocks`` has one entry for each."""

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        self.widths = found.widths or (found.module.weight.shape[0],)
        for width in self.widths:
            if width % size.rank:
                raise UserError(
                    f"--network_dim {size.rank}: must divide the {width} output features of {found.lora_name}"
                )
        self.oft_blocks = nn.ParameterList(
            torch.zeros(size.rank, width // size.rank, width // size.rank) for width in self.widths
        )

    def generators(self) -> list[Tensor]:
        """Q (n, k, k) of each projection, float32, within its bound."""
        alpha = self.scale * self.rank
        return [generator_of(blocks, alpha * width) for blocks, width in zip(self.oft_blocks, self.widths, strict=True)]

    def moved(self) -> list[Tensor]:
        """R - I (n, k, k) of each projection, float32."""
        return [moved_by(generator) for generator in self.generators()]

    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        own = own_product(self, out, x)  # (B, ..., out)
        changes = []
        for part, moved in zip(own.split(self.widths, dim=-1), self.moved(), strict=True):
            strength = moved * self.multiplier
            if not torch.is_autocast_enabled(own.device.type):
                strength = strength.to(own.dtype)
            changes.append(_turned(part, strength))
        return (out + torch.cat(changes, dim=-1)).to(out.dtype)

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        device = self.oft_blocks[0].device
        base = self.base_weight.detach().to(device=device, dtype=torch.float32)  # (out, in)
        parts = zip(base.split(self.widths), self.moved(), strict=True)
        change = torch.cat([_turned(part.T, moved).T for part, moved in parts])  # (R^T - I) W
        return change * (self.multiplier if multiplier is None else multiplier)

    def change_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.get_weight(1.0))

    def scale_change(self, ratio: Tensor) -> None:
        raise UserError(f"--scale_weight_norms: {OftFluxNetwork.no_max_norm}")


def _turned(features: Tensor, moved: Tensor) -> Tensor:
    """(..., n k) times the block-diagonal of (n, k, k)."""
    return torch.einsum("...nk,nkm->...nm", features.unflatten(-1, moved.shape[:2]), moved).flatten(-2)


class OftFluxNetwork(OftNetwork):
    """OFT on FLUX.1 or Chroma."""

    module_name = MODULE_NAME
    args_class = OftFluxArgs
    default_denoiser = DENOISER
    no_max_norm = OftNetwork.no_max_norm.replace(OftNetwork.module_name, MODULE_NAME)

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> OftFluxModule:
        return OftFluxModule(found, size, **settings)

    @classmethod
    def sizes_in(cls, weights: Mapping[str, Tensor], source: str) -> dict[str, RankAlpha]:
        first = ".oft_blocks.0"
        first_blocks = {name.replace(first, ".oft_blocks"): tensor for name, tensor in weights.items()}
        return super().sizes_in(first_blocks, source)


def check_network_args(network_args: Mapping[str, object], denoiser: LoraTarget = DENOISER) -> None:
    """See ``networks.lora.check_network_args``."""
    OftFluxNetwork.args_of(network_args, denoiser)


#: the same functions as in ``networks.lora``
create_network = OftFluxNetwork.create
create_network_from_weights = OftFluxNetwork.create_from_weights
