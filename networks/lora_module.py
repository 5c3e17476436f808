"""The low-rank adapter of one module (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", 4.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.adapter_module import AdapterModule, Dropouts
from networks.low_rank import AddLowRank, Casts, LinearWithLowRank
from networks.targets import FoundModule, RankAlpha


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
        self.weight_shape = original.weight.shape
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
        #: of the network, if it has some
        self.casts: Casts | None = None

    def changed_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own_sum = type(self).add_change is LoraModule.add_change
        if args or kwargs or not own_sum or not self._sums_in_products or not self._is_plain_linear(x):
            return super().changed_output(x, *args, **kwargs)
        weight, bias = self.original.weight, self.original.bias
        return LinearWithLowRank.apply(weight, bias, x, *self._for_product())

    def _for_product(self) -> tuple[Tensor, Tensor, float, Casts | None]:
        """Return both halves, their factor, and their copies in the dtype of the product."""
        uses_casts = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return *self.halves_in_use(), self.multiplier * self.scale_in_use, self.casts if uses_casts else None

    def weights_to_cast(self) -> list[Tensor]:
        """Return the weights that a forward pass casts as they are."""
        if not self.enabled or not self._sums_in_products:
            return []
        halves = (self._modules.get(name) for name in ("lora_down", "lora_up"))
        return [half.weight for half in halves if half is not None]

    @property
    def _sums_in_products(self) -> bool:
        """Whether nothing acts between the two halves, so that the sum can be part of a matrix product."""
        if self.training and self._drops_between_halves:
            return False
        return isinstance(self.original, nn.Linear) and type(self).low_rank_output is LoraModule.low_rank_output

    def _is_plain_linear(self, x: Tensor) -> bool:
        """Whether the module computes the usual product, in the dtype of its frozen weight."""
        original, kind = self.original, x.device.type
        # the function of the class, not that of a wrapper, such as another adapter on the same module
        if (
            type(original) is not nn.Linear
            or getattr(self._original_forward, "__func__", None) is not nn.Linear.forward
        ):
            return False
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = original.weight
        return weight.dtype == dtype and not weight.requires_grad and type(weight) is nn.Parameter

    def add_change(self, out: Tensor, x: Tensor) -> Tensor:
        if self._sums_in_products:
            return AddLowRank.apply(out, x, *self._for_product())
        # scaling within the addition saves one pass over the output
        return torch.add(out, self.low_rank_output(x), alpha=self.multiplier * self.scale_in_use)

    @property
    def scale_in_use(self) -> float:
        """Return alpha / (ranks that this forward uses)."""
        return self.scale

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the down and of the up half, with all ranks."""
        return self.lora_down.weight, self.lora_up.weight

    def halves_in_use(self) -> tuple[Tensor, Tensor]:
        """Return the same with the ranks that this forward uses."""
        return self.halves()

    def up_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the up half, whose learning rate LoRA+ raises."""
        return [self.lora_up.weight]

    def low_rank_output(self, x: Tensor) -> Tensor:
        """Return U D x, in the shape of the module's output, without scale and multiplier."""
        down, up = self.halves_in_use()
        # autocast casts (and caches) the weights; without it float32 adapters are cast to a half-precision base's dtype
        if not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(x.dtype), up.to(x.dtype)
        is_conv = isinstance(self.original, nn.Conv2d)
        if is_conv:
            layer = self.original
            hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)  # (B, r, h, w)
        else:
            hidden = F.linear(x, down)  # (B, ..., r)
        if self.training:
            hidden = self._drop(hidden, rank_axis=1 if is_conv else hidden.dim() - 1)
        return F.conv2d(hidden, up) if is_conv else F.linear(hidden, up)

    @property
    def _drops_between_halves(self) -> bool:
        """Whether ``_drop`` changes anything."""
        return bool(self.dropouts.neuron or self.dropouts.rank)

    def _drop(self, hidden: Tensor, rank_axis: int) -> Tensor:
        if self.dropouts.neuron:
            hidden = F.dropout(hidden, self.dropouts.neuron)
        if self.dropouts.rank:
            keep = 1.0 - self.dropouts.rank
            shape = [1] * hidden.dim()
            shape[0], shape[rank_axis] = hidden.shape[0], hidden.shape[rank_axis]
            # dividing by the kept fraction keeps the expected change
            hidden = hidden * hidden.new_empty(shape).bernoulli_(keep).div_(keep)
        return hidden

    def get_weight(self, multiplier: float | None = None) -> Tensor:
        return self.low_rank_weight() * (self.multiplier if multiplier is None else multiplier)

    def low_rank_weight(self) -> Tensor:
        """Return (alpha / r) U D, float32, in the weight's shape."""
        down, up = (half.float().flatten(1) for half in self.halves())  # (r, in * kh * kw), (out, r)
        return (up @ down * self.scale).view(self.weight_shape)

    def change_norm(self) -> Tensor:
        # |U D|^2 = trace(U^T U D D^T): two (r, r) products instead of the whole (out, in) matrix
        down, up = (half.float().flatten(1) for half in self.halves())
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0.0).sqrt() * abs(self.scale)

    def scale_change(self, ratio: Tensor) -> None:
        root = ratio.sqrt()
        self.lora_up.weight.mul_(root)
        self.lora_down.weight.mul_(root)
