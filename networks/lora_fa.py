"""LoRA-FA for SD 1.x, 2.x and SDXL (``--network_module networks.lora_fa``): a LoRA with a frozen random down half.

W becomes W + (alpha / r) U D, where D is drawn once and frozen and only U is trained (Zhang et al. 2023, "LoRA-FA:
Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv:2308.03303, section 3). The backward
pass then needs D x alone, r numbers for each token, and not the input x of each adapted module; gradients, optimizer
state and averages exist for U only. The change stays within the r directions of D, so ranks are larger than a LoRA's.

D is normal with variance 1 / fan_in, so that D x has the variance of x. It is saved in files and states like a trained
tensor: files have the names and shapes of ``networks.lora``, which reads them too.

Network args: those of ``networks.lora`` without LoRA+ and DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from networks.adapter_module import Dropouts
from networks.lora import LoraNetwork
from networks.lora_args import LoraArgs
from networks.lora_module import LoraModule
from networks.targets import FoundModule, RankAlpha

MODULE_NAME = "networks.lora_fa"

_NO_RATIO = "only the up half is trained, so that there is no second rate; leave it out"
_NO_DORA = "its magnitudes would need the gradients that are saved here; networks.lora has it"


class LoraFaArgs(LoraArgs):
    """The args of ``networks.lora``, except those that need two trained halves."""

    module_name = MODULE_NAME
    refused: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "loraplus_lr_ratio": _NO_RATIO,
            "loraplus_unet_lr_ratio": _NO_RATIO,
            "loraplus_text_encoder_lr_ratio": _NO_RATIO,
            "dora": _NO_DORA,
            "dora_on_output": _NO_DORA,
        }
    )


class LoraFaModule(LoraModule):
    """Low-rank change of one ``Linear`` or ``Conv2d``; ``lora_down.weight`` is a buffer."""

    def __init__(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float = 1.0, dropouts: Dropouts = Dropouts()
    ) -> None:
        super().__init__(found, size, multiplier=multiplier, dropouts=dropouts)
        frozen = self.lora_down.weight.detach()
        torch.nn.init.normal_(frozen, std=1.0 / math.sqrt(frozen[0].numel()))
        # a buffer is saved and loaded, but is no parameter for optimizers and averages
        del self.lora_down.weight
        self.lora_down.register_buffer("weight", frozen)

    @torch.no_grad()
    def scale_change(self, ratio: Tensor) -> None:
        self.lora_up.weight.mul_(ratio)


class LoraFaNetwork(LoraNetwork):
    """LoRA-FA on text encoders and a denoiser."""

    module_name = MODULE_NAME
    args_class = LoraFaArgs

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> LoraFaModule:
        return LoraFaModule(found, size, **settings)


check_network_args = LoraFaNetwork.check_network_args
create_network = LoraFaNetwork.create
create_network_from_weights = LoraFaNetwork.create_from_weights
