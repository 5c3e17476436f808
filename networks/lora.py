"""LoRA for SD 1.x and 2.x (``--network_module networks.lora``).

The weight W (out, in) of a frozen module becomes W + multiplier * (alpha / r) * U D, with U (out, r) and D (r, in)
trained (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1). U starts at zero.

* LoRA-LierLa, the default: linear layers and 1x1 convolutions of the attention blocks and text encoder layers.
* LoRA-C3Lier, with the network arg ``conv_dim``: also the ResNet blocks, downsamplers and upsamplers. Their 3x3
  convolutions have rank ``conv_dim``, their linear layers and 1x1 shortcuts the network's rank.

Network args: ``conv_dim``, ``conv_alpha`` (default 1); ``rank_dropout``, ``module_dropout`` (probabilities);
``loraplus_lr_ratio``, ``loraplus_unet_lr_ratio``, ``loraplus_text_encoder_lr_ratio`` (rate of U over rate of D: Hayou
et al. 2024, "LoRA+"); for the U-Net's blocks, counted as in ``networks/unet_blocks.py``: ``block_dims``,
``block_alphas``, ``conv_block_dims``, ``conv_block_alphas`` (25 values), ``down_lr_weight`` (12), ``mid_lr_weight``
(1), ``up_lr_weight`` (12), ``block_lr_zero_threshold``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.architectures.base import LoraTarget
from library.errors import UserError
from networks.base import AdapterModule, AdapterNetwork, Dropouts, NetworkPart, RateGroup, as_list
from networks.network_args import (
    list_reader,
    read_network_args,
    read_number,
    read_positive,
    read_probability,
    read_rank,
)
from networks.targets import FoundModule, RankAlpha, RankRule, find_modules
from networks.unet_blocks import DOWN_BLOCKS, NUM_BLOCKS, UP_BLOCKS, unet_block_index
from networks.weights import ranks_and_alphas, read_weights, refuse_misfits, select_weights

MODULE_NAME = "networks.lora"
DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0

TEXT_ENCODER = LoraTarget("lora_te", ("CLIPAttention", "CLIPMLP"))
UNET = LoraTarget("lora_unet", ("Transformer2DModel",))
UNET_WITH_CONV = LoraTarget("lora_unet", (*UNET.module_classes, "ResnetBlock2D", "Downsample2D", "Upsample2D"))

_READERS = {
    "conv_dim": read_rank,
    "conv_alpha": read_number,
    "dropout": read_probability,  # trainers of the published protocol pass --network_dropout here as well
    "rank_dropout": read_probability,
    "module_dropout": read_probability,
    "loraplus_lr_ratio": read_positive,
    "loraplus_unet_lr_ratio": read_positive,
    "loraplus_text_encoder_lr_ratio": read_positive,
    "block_dims": list_reader(read_rank, NUM_BLOCKS),
    "block_alphas": list_reader(read_number, NUM_BLOCKS),
    "conv_block_dims": list_reader(read_rank, NUM_BLOCKS),
    "conv_block_alphas": list_reader(read_number, NUM_BLOCKS),
    "down_lr_weight": list_reader(read_number, DOWN_BLOCKS),
    "mid_lr_weight": list_reader(read_number, 1),
    "up_lr_weight": list_reader(read_number, UP_BLOCKS),
    "block_lr_zero_threshold": read_number,
}
_RANK_KEYS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_BLOCK_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


@dataclass(frozen=True)
class LoraArgs:
    """The network args, read. Block values are by block number; ``None`` where nothing was given."""

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

    @staticmethod
    def read(given: Mapping[str, object]) -> LoraArgs:
        """Raises UserError for unknown keys, wrong values and keys that would have no effect."""
        values = read_network_args(given, _READERS, MODULE_NAME)
        problems = []
        if "conv_dim" not in values and "conv_block_dims" not in values:
            problems += [
                f"--network_args {key} has no effect without conv_dim or conv_block_dims"
                for key in ("conv_alpha", "conv_block_alphas")
                if key in values
            ]
        rates = [values.pop(key, None) for key in _BLOCK_RATES]
        if any(rate is not None for rate in rates):
            down, mid, up = rates
            values["block_lr_weights"] = (down or (1.0,) * DOWN_BLOCKS) + (mid or (1.0,)) + (up or (1.0,) * UP_BLOCKS)
        elif "block_lr_zero_threshold" in values:
            needed = ", ".join(_BLOCK_RATES)
            problems.append(f"--network_args block_lr_zero_threshold has no effect without one of {needed}")
        if problems:
            raise UserError("\n".join(problems))
        return LoraArgs(**values)

    @property
    def adapts_spatial_convs(self) -> bool:
        return bool(self.conv_dim) or any(self.conv_block_dims or ())

    def dropouts(self, neuron_dropout: float | None) -> Dropouts:
        neuron = self.dropout if neuron_dropout is None else neuron_dropout
        if neuron is not None and not 0 <= neuron < 1:
            raise UserError(f"--network_dropout {neuron}: must be at least 0 and less than 1")
        return Dropouts(neuron or 0.0, self.rank_dropout, self.module_dropout)

    def unet_size(self, found: FoundModule, rank: int, alpha: float) -> RankAlpha | None:
        """Rank and alpha of a U-Net module, given the network's; ``None`` leaves it alone."""
        by_block = (self.block_dims, self.block_alphas, self.conv_block_dims, self.conv_block_alphas)
        block = None
        if self.block_lr_weights is not None or any(values is not None for values in by_block):
            block = unet_block_index(found.path)
        if self.block_lr_weights is not None and self.block_lr_weights[block] <= self.block_lr_zero_threshold:
            return None
        if found.is_spatial_conv:
            rank = self.conv_dim or 0 if self.conv_block_dims is None else self.conv_block_dims[block]
            alpha = self.conv_alpha if self.conv_block_alphas is None else self.conv_block_alphas[block]
        else:
            rank = rank if self.block_dims is None else self.block_dims[block]
            alpha = alpha if self.block_alphas is None else self.block_alphas[block]
        return _size(rank, alpha)

    def loraplus_ratio(self, is_text_encoder: bool) -> float | None:
        own = self.loraplus_text_encoder_lr_ratio if is_text_encoder else self.loraplus_unet_lr_ratio
        return self.loraplus_lr_ratio if own is None else own


def _size(rank: int, alpha: float) -> RankAlpha | None:
    """An alpha of 0 stands for the rank, so that the scale is 1."""
    return RankAlpha(rank, float(alpha or rank)) if rank else None


class LoraModule(AdapterModule):
    """Low-rank change of one ``Linear`` or ``Conv2d``.

    Shapes of ``lora_down.weight`` and ``lora_up.weight``: linear (r, in) and (out, r); convolution
    (r, in, kh, kw) and (out, r, 1, 1), the first with the original's stride, padding and dilation.
    """

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        original = found.module
        if isinstance(original, nn.Conv2d):
            self.lora_down = nn.Conv2d(
                original.in_channels,
                size.rank,
                original.kernel_size,
                original.stride,
                original.padding,
                original.dilation,
                bias=False,
            )
            self.lora_up = nn.Conv2d(size.rank, original.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(original.in_features, size.rank, bias=False)
            self.lora_up = nn.Linear(size.rank, original.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
        # autocast casts (and caches) the weights itself; without it float32 adapters follow a half-precision base
        if down.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(x.dtype), up.to(x.dtype)
        is_conv = isinstance(self.lora_down, nn.Conv2d)
        if is_conv:
            layer = self.lora_down
            hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)  # (B, r, h, w)
        else:
            hidden = F.linear(x, down)  # (B, ..., r)
        if self.training:
            hidden = self._drop(hidden, rank_axis=1 if is_conv else hidden.dim() - 1)
        change = F.conv2d(hidden, up) if is_conv else F.linear(hidden, up)
        # the scale rides on the addition, which saves one pass over the output
        return torch.add(out, change, alpha=self.multiplier * self.scale)

    def _drop(self, hidden: Tensor, rank_axis: int) -> Tensor:
        if self.dropouts.neuron:
            hidden = F.dropout(hidden, self.dropouts.neuron)
        if self.dropouts.rank:
            keep = 1.0 - self.dropouts.rank
            shape = [1] * hidden.dim()
            shape[0], shape[rank_axis] = hidden.shape[0], hidden.shape[rank_axis]
            # dividing by the share that is kept leaves the expected change as it is
            hidden = hidden * hidden.new_empty(shape).bernoulli_(keep).div_(keep)
        return hidden

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        strength = self.multiplier if multiplier is None else multiplier
        up = self.lora_up.weight.float().flatten(1)  # (out, r)
        down = self.lora_down.weight.float().flatten(1)  # (r, in * kh * kw)
        return (up @ down * (strength * self.scale)).view(self.original.weight.shape)

    def change_norm(self) -> Tensor:
        # |U D|^2 = trace(U^T U D D^T): two (r, r) products instead of the whole (out, in) matrix
        up = self.lora_up.weight.float().flatten(1)
        down = self.lora_down.weight.float().flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0.0).sqrt() * abs(self.scale)

    def scale_change(self, ratio: Tensor) -> None:
        root = ratio.sqrt()
        self.lora_up.weight.mul_(root)
        self.lora_down.weight.mul_(root)


class LoraNetwork(AdapterNetwork):
    """LoRA on text encoders and a denoiser, with LoRA+ and block-wise learning rates."""

    adapter_class = LoraModule
    module_name = MODULE_NAME

    def __init__(
        self,
        parts: Sequence[NetworkPart],
        rank_rule: RankRule,
        args: LoraArgs,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts = Dropouts(),
    ) -> None:
        super().__init__(parts, rank_rule, multiplier=multiplier, dropouts=dropouts)
        self.args = args

    def rate_groups(self, part: NetworkPart) -> list[RateGroup]:
        weights = self.args.block_lr_weights
        if weights is None or part.is_text_encoder:
            return super().rate_groups(part)
        blocks: dict[int, list[AdapterModule]] = defaultdict(list)
        for path, adapter in part.adapters.items():
            blocks[unet_block_index(path)].append(adapter)
        zero_up_to = self.args.block_lr_zero_threshold
        return [
            RateGroup(f"{part.label}_block{i}", weights[i] if weights[i] > zero_up_to else 0.0, blocks[i])
            for i in sorted(blocks)
        ]

    def split_parameters(
        self, part: NetworkPart, adapters: Sequence[AdapterModule]
    ) -> list[tuple[str, float, list[nn.Parameter]]]:
        ratio = self.args.loraplus_ratio(part.is_text_encoder)
        if ratio is None:
            return super().split_parameters(part, adapters)
        down = [adapter.lora_down.weight for adapter in adapters]
        up = [adapter.lora_up.weight for adapter in adapters]
        return [("", 1.0, down), (" plus", ratio, up)]


def check_network_args(network_args: Mapping[str, object]) -> None:
    """Check ``--network_args`` before any model is loaded.

    Raises:
        UserError: unknown keys, wrong values, keys without effect; one line each.
    """
    LoraArgs.read(network_args)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> LoraNetwork:
    """A new network that changes nothing yet.

    Args:
        network_dim: rank, default 4.
        network_alpha: default 1; 0 stands for the rank.
        vae: part of the protocol; VAEs carry no adapters.
        kwargs: the network args, as text.

    Raises:
        UserError: wrong network args or rank.
    """
    args = LoraArgs.read(kwargs)
    rank = DEFAULT_RANK if network_dim is None else network_dim
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
    if rank < 1:
        raise UserError(f"--network_dim {rank}: the rank must be at least 1")
    parts = _parts(text_encoder, unet, UNET_WITH_CONV if args.adapts_spatial_convs else UNET)

    def rank_rule(found: FoundModule) -> RankAlpha | None:
        if found.lora_name.startswith(f"{UNET.prefix}_"):
            return args.unet_size(found, rank, alpha)
        return _size(rank, alpha)

    return LoraNetwork(parts, rank_rule, args, multiplier=multiplier, dropouts=args.dropouts(neuron_dropout))


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module] | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> tuple[LoraNetwork, Mapping[str, Tensor]]:
    """A network with the modules, ranks and alphas of a file, and the file's tensors, which are not loaded yet.

    Args:
        file: read unless ``weights_sd`` holds its tensors already.
        for_inference: without gradients and in eval mode.
        kwargs: network args that do not give ranks (dropouts, rates), as text.

    Raises:
        UserError: unreadable file, tensors that fit no module of the models, or wrong network args.
    """
    if idle := [key for key in _RANK_KEYS if kwargs.get(key) is not None]:
        raise UserError(f"--network_args {', '.join(idle)}: no effect where ranks and alphas come from a file")
    args = LoraArgs.read(kwargs)
    if weights_sd is None:
        weights_sd = read_weights(file)
    sizes = {name: RankAlpha(rank, alpha) for name, (rank, alpha) in ranks_and_alphas(weights_sd).items()}
    parts = _parts(text_encoder, unet, UNET_WITH_CONV)
    source = str(file) if file else "the given weights"
    available = {found.lora_name for part in parts for found in find_modules(part.model, part.target)}
    refuse_misfits(sizes.keys(), available, weights_sd, source, MODULE_NAME)
    dropouts = args.dropouts(neuron_dropout)
    network = LoraNetwork(
        parts, lambda found: sizes.get(found.lora_name), args, multiplier=multiplier, dropouts=dropouts
    )
    select_weights(network, weights_sd, source)
    if for_inference:
        network.eval().requires_grad_(False)
    return network, weights_sd


def _parts(
    text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module, unet_target: LoraTarget
) -> list[NetworkPart]:
    parts = [NetworkPart("textencoder", model, TEXT_ENCODER, True) for model in as_list(text_encoder)]
    return [*parts, NetworkPart("unet", unet, unet_target, False)]
