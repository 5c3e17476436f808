"""LoRA for SD 1.x, 2.x and SDXL (``--network_module networks.lora``).

The weight W (out, in) of a frozen module becomes W + multiplier * (alpha / r) * U D, with U (out, r) and D (r, in)
trained (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1). U starts at zero.

* LoRA-LierLa, the default: linear layers and 1x1 convolutions of the attention blocks and text encoder layers.
* LoRA-C3Lier, with the network arg ``conv_dim``: also the ResNet blocks, downsamplers and upsamplers. Their 3x3
  convolutions have rank ``conv_dim``, their linear layers and 1x1 shortcuts the network's rank.
* ``rs_lora=True``: the factor is alpha / sqrt(r) instead, which keeps high ranks learning (Kalajdzievski 2023, "A Rank
  Stabilization Scaling Factor for Fine-Tuning with LoRA", theorem 3.2). The alpha of the network and of its files is
  then alpha * sqrt(r), so that every program's alpha / r is that factor; ``ss_network_alpha`` holds the given alpha,
  and ``ss_network_args`` has ``rs_lora``.
* ``dora=True``: ``networks/dora.py``.

Network args: ``conv_dim``, ``conv_alpha`` (default 1); ``rank_dropout``, ``module_dropout`` (probabilities);
``loraplus_lr_ratio``, ``loraplus_unet_lr_ratio``, ``loraplus_text_encoder_lr_ratio`` (rate of U over rate of D: Hayou
et al. 2024, "LoRA+"); ``rs_lora``, ``dora``, ``dora_on_output``; for all modules by name, ``pattern=value,...``, the
first that fits wins: ``network_reg_dims`` and ``network_reg_lrs``, which replace the network's rank and rate; for the
U-Net's blocks, counted as in ``networks/unet_blocks.py``: ``block_dims``, ``block_alphas``, ``conv_block_dims``,
``conv_block_alphas`` (25 values; SDXL 23), ``down_lr_weight`` and ``up_lr_weight`` (12; SDXL 9; or a curve such as
``cosine+0.25``), ``mid_lr_weight`` (1; SDXL 3), ``block_lr_zero_threshold``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from library.architectures.lora_target import LoraTarget
from library.architectures.registry import default_architecture
from library.errors import UserError
from networks.adapter_module import AdapterModule, Dropouts
from networks.base import AdapterNetwork, NetworkPart, RateGroup, as_list
from networks.dora import DoraModule
from networks.lora_args import DEFAULT_ALPHA, MODULE_NAME, LoraArgs
from networks.lora_module import LoraModule
from networks.low_rank import Casts
from networks.targets import FoundModule, RankAlpha, RankRule, find_modules, target_of
from networks.unet_blocks import unet_block_index
from networks.weights import (
    read_weights,
    refuse_misfits,
    refuse_other_model,
    select_weights,
    sizes_of,
    warn_of_missing_layers,
)

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_RANK = 4

#: models that no family has loaded count as those of the default one
_FAMILY = default_architecture()
TEXT_ENCODER, UNET = _FAMILY.text_encoder_targets[0], _FAMILY.denoiser_target


class LoraNetwork(AdapterNetwork):
    """LoRA on text encoders and a denoiser, with LoRA+ and block-wise learning rates; the base of its relatives."""

    module_name = MODULE_NAME
    args_class: ClassVar[type[LoraArgs]] = LoraArgs
    #: of models that no family has loaded
    default_denoiser: ClassVar[LoraTarget] = UNET

    def __init__(
        self,
        parts: Sequence[NetworkPart],
        rank_rule: RankRule,
        args: LoraArgs,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts = Dropouts(),
    ) -> None:
        self.args = args  # before the adapters are made, some of which read it
        super().__init__(parts, rank_rule, multiplier=multiplier, dropouts=dropouts)
        casts = Casts(self.weights_to_cast)
        for adapter in self.adapters:
            if isinstance(adapter, LoraModule):
                adapter.casts = casts

    def weights_to_cast(self) -> list[Tensor]:
        """Return the weights that the adapters cast in each forward pass."""
        adapters = (adapter for adapter in self.adapters if isinstance(adapter, LoraModule))
        return [weight for adapter in adapters for weight in adapter.weights_to_cast()]

    @classmethod
    def create(
        cls,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: object,
    ) -> Self:
        """Make a new network that changes nothing yet: ``create_network`` of the module protocol.

        Args:
            network_dim: rank, default 4.
            network_alpha: default 1; 0 stands for the rank.
            vae: part of the protocol; VAEs carry no adapters.
            kwargs: the network args, as text.

        Raises:
            UserError: wrong network args or rank.
        """
        args = cls.args_of(kwargs, target_of(unet, cls.default_denoiser))
        rank = DEFAULT_RANK if network_dim is None else network_dim
        alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
        args.check_size(rank, alpha)
        parts = cls.make_parts(text_encoder, unet, args)
        in_unet = tuple(f"{part.target.prefix}_" for part in parts if not part.is_text_encoder)

        def rank_rule(found: FoundModule) -> RankAlpha | None:
            return args.size_of(found, rank, alpha, in_unet=found.lora_name.startswith(in_unet))

        network = cls(parts, rank_rule, args, multiplier=multiplier, dropouts=args.dropouts(neuron_dropout))
        candidates = [found.lora_name for part in parts for found in find_modules(part.model, part.target)]
        args.network_reg_dims.refuse_idle("network_reg_dims", candidates)
        args.network_reg_lrs.refuse_idle("network_reg_lrs", [adapter.lora_name for adapter in network.adapters])
        return network

    @classmethod
    def create_from_weights(
        cls,
        multiplier: float,
        file: str | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        **kwargs: object,
    ) -> tuple[Self, Mapping[str, Tensor]]:
        """Make a network with the modules, ranks and alphas of a file, and return it with the file's tensors, not
        loaded yet.

        Args:
            file: read unless ``weights_sd`` holds its tensors already.
            for_inference: without gradients and in eval mode.
            kwargs: network args that do not give ranks (dropouts, learning rates), as text.

        Raises:
            UserError: unreadable file, tensors that fit no module of the models, or wrong network args.
        """
        if idle := [key for key in cls.args_class.rank_keys if kwargs.get(key) is not None]:
            raise UserError(f"--network_args {', '.join(idle)}: no effect where ranks and alphas come from a file")
        denoiser = target_of(unet, cls.default_denoiser)
        args = cls.args_of(kwargs, denoiser)
        refuse_other_model(file, denoiser)
        parts = cls.make_parts(text_encoder, unet)
        if weights_sd is None:
            assert file is not None, "either a file or its weights are given"
            weights_sd = read_weights(file)
        weights_sd = cls.names_in(parts, weights_sd)
        source = str(file) if file else "the given weights"
        sizes = cls.sizes_in(weights_sd, source)
        available = {found.lora_name for part in parts for found in find_modules(part.model, part.target)}
        refuse_misfits(sizes.keys(), available, weights_sd, source, cls.module_name)
        warn_of_missing_layers(file, sizes.keys(), {found.lora_name for found in find_modules(unet, denoiser)})
        dropouts = args.dropouts(neuron_dropout)

        def rank_rule(found: FoundModule) -> RankAlpha | None:
            size = sizes.get(found.lora_name)
            return None if size is None else cls.size_in_file(found, size, weights_sd, args)

        network = cls(parts, rank_rule, args, multiplier=multiplier, dropouts=dropouts)
        select_weights(network, weights_sd, source)
        args.network_reg_lrs.refuse_idle("network_reg_lrs", [adapter.lora_name for adapter in network.adapters])
        if for_inference:
            network.eval().requires_grad_(False)
        return network, weights_sd

    @classmethod
    def check_network_args(cls, network_args: Mapping[str, object], denoiser: LoraTarget | None = None) -> None:
        """Check ``--network_args`` before any model is loaded.

        Args:
            denoiser: what the family says of its adapters.

        Raises:
            UserError: unknown keys, wrong values, keys without effect; one line each.
        """
        cls.args_of(network_args, denoiser or cls.default_denoiser)

    @classmethod
    def args_of(cls, network_args: Mapping[str, object], denoiser: LoraTarget) -> LoraArgs:
        """Read the network args and check them for a family. Raises UserError."""
        theirs = denoiser.network_modules
        if (theirs or cls.default_denoiser.network_modules) and cls.module_name not in theirs:
            use = " or ".join(theirs or (MODULE_NAME,))
            raise UserError(f"--network_module {cls.module_name}: it is not made for this model family; use {use}")
        return cls.args_class.read(network_args, denoiser.blocks)

    @classmethod
    def make_parts(
        cls, text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module, args: LoraArgs | None = None
    ) -> list[NetworkPart]:
        """Return the parts with all modules that may be adapted; without ``args``, those of a file."""
        encoders = as_list(text_encoder)
        parts = []
        for number, model in enumerate(encoders, start=1):
            label = f"textencoder {number}" if len(encoders) > 1 else "textencoder"
            parts.append(NetworkPart(label, model, cls.text_target(model, args), True))
        target = target_of(unet, cls.default_denoiser)
        if args is None or args.adapts_spatial_convs:
            target = target.with_convs()
        return [*parts, NetworkPart("unet", unet, target, False)]

    @classmethod
    def text_target(cls, text_encoder: nn.Module, args: LoraArgs | None) -> LoraTarget:
        """Return the target of a text encoder for ``make_parts``."""
        return target_of(text_encoder, TEXT_ENCODER)

    @classmethod
    def sizes_in(cls, weights: Mapping[str, Tensor], source: str) -> dict[str, RankAlpha]:
        """Return the size of each module's adapter in a file; ``source`` is its name in messages."""
        return sizes_of(weights)

    @classmethod
    def size_in_file(
        cls, found: FoundModule, size: RankAlpha, weights: Mapping[str, Tensor], args: LoraArgs
    ) -> RankAlpha:
        """Return the size of a module's adapter; the file has ``size``."""
        return size

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> LoraModule:
        return (LoraModule if size.dora is None else DoraModule)(found, size, **settings)

    def rate_groups(self, part: NetworkPart) -> list[RateGroup]:
        """Group modules by learning rate: one group per pattern, the others by block or all in one."""
        patterns = self.args.network_reg_lrs
        by_pattern: dict[int, list[AdapterModule]] = defaultdict(list)
        others: dict[str, AdapterModule] = {}
        for path, adapter in part.adapters.items():
            place = patterns.place_of(adapter.lora_name)
            if place is None:
                others[path] = adapter
            else:
                by_pattern[place].append(adapter)
        own = [
            RateGroup(f"{part.label}_reg{place}", 1.0, by_pattern[place], patterns.entries[place][1])
            for place in sorted(by_pattern)
        ]
        weights = self.args.block_lr_weights
        if weights is None or part.is_text_encoder:
            return [RateGroup(part.label, 1.0, list(others.values())), *own]
        blocks: dict[int, list[AdapterModule]] = defaultdict(list)
        for path, adapter in others.items():
            blocks[unet_block_index(path, self.args.blocks)].append(adapter)
        zero_up_to = self.args.block_lr_zero_threshold
        by_block = [
            RateGroup(f"{part.label}_block{i}", weights[i] if weights[i] > zero_up_to else 0.0, blocks[i])
            for i in sorted(blocks)
        ]
        return by_block + own

    def split_parameters(
        self, part: NetworkPart, adapters: Sequence[AdapterModule]
    ) -> list[tuple[str, float, list[nn.Parameter]]]:
        ratio = self.args.loraplus_ratio(part.is_text_encoder)
        if ratio is None:
            return super().split_parameters(part, adapters)
        up = [parameter for adapter in adapters for parameter in adapter.up_parameters()]
        raised = {id(weight) for weight in up}
        others = [p for adapter in adapters for p in adapter.parameters() if id(p) not in raised]
        return [("", 1.0, others), (" plus", ratio, up)]


check_network_args = LoraNetwork.check_network_args
create_network = LoraNetwork.create
create_network_from_weights = LoraNetwork.create_from_weights
