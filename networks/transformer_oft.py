"""OFT of transformers, made for a family by ``preset``: output features are rotated.

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
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.architectures.lora_table import LoraTable
from library.architectures.network_args import Reader, read_bool
from library.errors import UserError
from networks.adapter_module import AdapterModule, Dropouts
from networks.oft import OftArgs, OftNetwork, generator_of, moved_by
from networks.own_product import own_product
from networks.targets import FoundModule, RankAlpha
from networks.transformer_args import refused_by


class TransformerOftArgs(OftArgs):
    """``enable_all_linear`` adapts more than the attentions' layers."""

    own_readers: ClassVar[Mapping[str, Reader]] = MappingProxyType({"enable_all_linear": read_bool})
    rank_keys: ClassVar[tuple[str, ...]] = ("enable_all_linear", "network_reg_dims")


class StackedOftModule(AdapterModule):
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
        raise UserError(f"--scale_weight_norms: {OftNetwork.no_max_norm}")


def _turned(features: Tensor, moved: Tensor) -> Tensor:
    """(..., n k) times the block-diagonal of (n, k, k)."""
    return torch.einsum("...nk,nkm->...nm", features.unflatten(-1, moved.shape[:2]), moved).flatten(-2)


class TransformerOftNetwork(OftNetwork):
    """OFT on a transformer; the network of a family is made by ``preset``."""

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> StackedOftModule:
        return StackedOftModule(found, size, **settings)

    @classmethod
    def sizes_in(cls, weights: Mapping[str, Tensor], source: str) -> dict[str, RankAlpha]:
        first = ".oft_blocks.0"
        first_blocks = {name.replace(first, ".oft_blocks"): tensor for name, tensor in weights.items()}
        return super().sizes_in(first_blocks, source)


def preset(name: str, module: str, table: LoraTable) -> type[TransformerOftNetwork]:
    """Return the network class of one family.

    Args:
        name: of the class.
        module: the network module, as ``--network_module`` names it.
        table: what the family says of its LoRA.
    """
    refused = {**OftArgs.refused, **refused_by(table), "enable_conv": refused_by(table)["conv_dim"]}
    args = type("FamilyOftArgs", (TransformerOftArgs,), {"module_name": module, "refused": MappingProxyType(refused)})
    attributes = {
        "__module__": module,
        "__doc__": f"OFT on {table.title}.",
        "module_name": module,
        "args_class": args,
        "default_denoiser": table.denoiser,
        "no_max_norm": OftNetwork.no_max_norm.replace(OftNetwork.module_name, module),
    }
    return type(name, (TransformerOftNetwork,), attributes)
