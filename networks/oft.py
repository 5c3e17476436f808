"""OFT for SD 1.x, 2.x and SDXL (``--network_module networks.oft``): output features of a U-Net's layers are rotated.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv:2306.07280). The weight W
(out, in) becomes R^T W with R block-diagonal and orthogonal. All columns of W are rotated alike, which keeps the angles
between them, and so their hyperspherical energy. (The paper rotates the rows, in the space of the inputs; published
files, and so this module, rotate outputs.) Each block is the Cayley transform (section 4.1) of a
skew-symmetric Q = B - B^T,

    R = (I + Q) (I - Q)^-1 = I + 2 Q (I - Q)^-1,

and B starts at zero. The bias is not rotated. ``--network_dim`` is the number of blocks n (4, if not given): more
blocks make a smaller file. The constrained form of the paper (COFT) bounds the distance of R from I; here
``--network_alpha`` does, by |Q| <= alpha * out, the Frobenius norm of all blocks of a module; 1e-4 to 1e-2 are usual.

Files hold ``oft_unet_<module>.oft_blocks`` (n, out / n, out / n) and ``.alpha``, a layout that ComfyUI, Forge and
diffusers do not read: ``networks/convert_lora.py`` writes the one of LyCORIS' Diag-OFT, which ComfyUI reads. A strength
other than 1 interpolates between W and R^T W, W + multiplier (R^T W - W), as in other programs; only 1 and 0 are
rotations.

The text encoders are not adapted. Network args: ``enable_all_linear`` (all linear layers and 1x1 convolutions of
the attention blocks, not only those of the attentions), ``enable_conv`` (ResNet blocks, downsamplers, upsamplers too);
``module_dropout``; ``network_reg_dims`` and ``network_reg_lrs``, and the learning rates of blocks, as in
``networks.lora``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.architectures.lora_target import LoraTarget
from library.architectures.network_args import Reader, read_bool
from library.errors import UserError
from networks.adapter_module import AdapterModule, Dropouts
from networks.base import NetworkPart, as_list
from networks.lora import LoraNetwork
from networks.lora_args import LoraArgs
from networks.own_product import own_product
from networks.targets import FoundModule, RankAlpha, target_of

logger = logging.getLogger(__name__)

MODULE_NAME = "networks.oft"
PREFIX = "oft_unet"

#: larger alphas hardly bound anything
_LOOSE_ALPHA = 1.0

_NO_RANKS = "an OFT has no ranks; leave it out"
_ONE_COUNT = "the number of its blocks is --network_dim, or network_reg_dims by module; leave it out"
_USE_ENABLE_CONV = "convolutions are adapted with enable_conv=True"
_NO_HALVES = "an OFT has no halves with a rate each; leave it out"
_NO_ACTIVATION = "an OFT has no activation of its own to drop from; module_dropout leaves whole adapters out"
_NO_MAX_NORM = "networks.oft rotates weights and leaves their norms as they are; --network_alpha is its bound"


@dataclass(frozen=True)
class OftArgs(LoraArgs):
    """``enable_all_linear`` and ``enable_conv`` adapt more than the attentions' linear layers."""

    module_name: ClassVar[str] = MODULE_NAME
    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **dict.fromkeys(("conv_dim", "conv_alpha"), _USE_ENABLE_CONV),
            **dict.fromkeys(("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"), _ONE_COUNT),
            **dict.fromkeys(
                ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"), _NO_HALVES
            ),
            **dict.fromkeys(("rs_lora", "dora", "dora_on_output", "rank_dropout"), _NO_RANKS),
            "dropout": _NO_ACTIVATION,
        }
    )
    own_readers: ClassVar[Mapping[str, Reader]] = MappingProxyType(
        {"enable_all_linear": read_bool, "enable_conv": read_bool}
    )
    rank_keys: ClassVar[tuple[str, ...]] = ("enable_all_linear", "enable_conv", "network_reg_dims")

    enable_all_linear: bool = False
    enable_conv: bool = False

    def check_size(self, rank: int, alpha: float) -> None:
        if rank < 1:
            raise UserError(f"--network_dim {rank}: the number of blocks must be at least 1")
        if not alpha > 0:
            raise UserError(f"--network_alpha {alpha:g}: must be greater than 0, as it bounds what is learned")
        if alpha >= _LOOSE_ALPHA:
            logger.warning("--network_alpha %g: hardly bounds the rotations of an OFT; 1e-4 to 1e-2 are usual", alpha)
        logger.info(
            "files of %s are read by this project alone, not by ComfyUI, Forge or diffusers; networks/convert_lora.py "
            "--to comfyui writes one for ComfyUI",
            self.module_name,
        )

    def dropouts(self, neuron_dropout: float | None) -> Dropouts:
        if neuron_dropout:
            raise UserError(f"--network_dropout: {self.module_name} cannot do it: {_NO_ACTIVATION}")
        return super().dropouts(neuron_dropout)

    def _size_in_unet(self, found: FoundModule, rank: int, alpha: float, block: int) -> tuple[int, float]:
        return rank, alpha


def generator_of(blocks: Tensor, bound: float) -> Tensor:
    """Return Q (n, k, k) of B, float32, with a norm up to ``bound``."""
    blocks = blocks.float()
    skew = blocks - blocks.transpose(1, 2)
    # below the bound the factor is exactly 1 and has no gradient, also at a norm of 0
    return skew * (bound / torch.linalg.vector_norm(skew).clamp(min=bound))


def moved_by(generator: Tensor) -> Tensor:
    """Return R - I (n, k, k) of Q."""
    unit = torch.eye(generator.shape[-1], device=generator.device, dtype=generator.dtype)
    # Q and (I - Q)^-1 commute; I - Q is never singular, so nothing waits for the device's error flag
    return torch.linalg.solve_ex(unit - generator, 2.0 * generator).result


class OftModule(AdapterModule):
    """Rotation of the output features of one ``Linear`` or ``Conv2d``; ``oft_blocks`` is (n, out / n, out / n)."""

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        self.features = found.module.weight.shape[0]
        if self.features % size.rank:
            raise UserError(
                f"--network_dim {size.rank}: must divide the {self.features} output features of {found.lora_name}"
            )
        width = self.features // size.rank
        self.oft_blocks = nn.Parameter(torch.zeros(size.rank, width, width))

    @property
    def bound(self) -> float:
        """Return the greatest norm of Q: alpha * out."""
        return self.scale * self.rank * self.features

    def generator(self) -> Tensor:
        """Q (n, k, k), float32, its norm within the bound."""
        return generator_of(self.oft_blocks, self.bound)

    def moved(self) -> Tensor:
        """R - I (n, k, k), float32: exactly 0 in a new network, which R itself would not be in lower precision."""
        return moved_by(self.generator())

    def rotation(self) -> Tensor:
        """R (n, k, k), float32."""
        moved = self.moved()
        return moved + torch.eye(moved.shape[-1], device=moved.device)

    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        own = own_product(self, out, x)
        moved = self.moved() * self.multiplier
        if not torch.is_autocast_enabled(own.device.type):
            moved = moved.to(own.dtype)
        axis = 1 if isinstance(self.original, nn.Conv2d) else own.dim() - 1
        parts = own.unflatten(axis, moved.shape[:2])  # (..., n, k, ...)
        equation = "bnkhw,nkm->bnmhw" if axis == 1 and own.dim() == 4 else "...nk,nkm->...nm"
        change = torch.einsum(equation, parts, moved).flatten(axis, axis + 1)
        return (out + change).to(out.dtype)

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        base = self.base_weight.detach().to(device=self.oft_blocks.device, dtype=torch.float32)
        parts = base.reshape(*self.oft_blocks.shape[:2], -1)  # (n, k, in * kh * kw)
        change = torch.einsum("nkm,nki->nmi", self.moved(), parts).reshape(base.shape)  # (R^T - I) W
        return change * (self.multiplier if multiplier is None else multiplier)

    def change_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.get_weight(1.0))

    def scale_change(self, ratio: Tensor) -> None:
        raise UserError(f"--scale_weight_norms: {_NO_MAX_NORM}")


class OftNetwork(LoraNetwork):
    """OFT on a U-Net, with block-wise learning rates."""

    module_name = MODULE_NAME
    args_class = OftArgs
    adapts_text_encoders = False
    no_max_norm = _NO_MAX_NORM

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> OftModule:
        return OftModule(found, size, **settings)

    @classmethod
    def make_parts(
        cls, text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module, args: LoraArgs | None = None
    ) -> list[NetworkPart]:
        # parts without modules, so that the protocol's counts of text encoders hold
        nothing = LoraTarget("oft_te", ())
        parts = [NetworkPart("textencoder", model, nothing, True) for model in as_list(text_encoder)]
        assert args is None or isinstance(args, OftArgs)
        target = replace(target_of(unet, cls.default_denoiser), prefix=PREFIX)
        if args is not None and not args.enable_all_linear:
            target = replace(target, module_classes=target.attention_classes)
        if args is None or args.enable_conv:
            target = target.with_convs()
        return [*parts, NetworkPart("unet", unet, target, False)]

    @classmethod
    def sizes_in(cls, weights: Mapping[str, Tensor], source: str) -> dict[str, RankAlpha]:
        """Return sizes as in the base class; the rank is the number of blocks. Raises UserError if an alpha is
        missing."""
        sizes = {}
        for name, tensor in weights.items():
            lora_name, _, kind = name.rpartition(".")
            if kind == "oft_blocks":
                alpha = weights.get(f"{lora_name}.alpha")
                if alpha is None:
                    raise UserError(
                        f"{source}: {lora_name}.alpha is missing beside oft_blocks; it is no file of {cls.module_name}"
                    )
                sizes[lora_name] = RankAlpha(tensor.shape[0], float(alpha))
        return sizes

    def apply_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Apply as in the base class. Raises UserError without the U-Net: nothing would be adapted."""
        if not apply_unet:
            raise UserError(
                f"--network_train_text_encoder_only: {self.module_name} adapts no text encoder; leave it out"
            )
        super().apply_to(text_encoder, unet, apply_text_encoder, apply_unet)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return groups as in the base class; learning rates of text encoders are ignored with a warning."""
        given = text_encoder_lr if isinstance(text_encoder_lr, (list, tuple)) else [text_encoder_lr]
        if any(given):
            logger.warning("--text_encoder_lr has no effect: %s adapts no text encoder", self.module_name)
        return super().prepare_optimizer_params_with_multiple_te_lrs(None, unet_lr, default_lr)


check_network_args = OftNetwork.check_network_args
create_network = OftNetwork.create
create_network_from_weights = OftNetwork.create_from_weights
