"""LoRA of transformers, made from what a family's ``LoraTable`` says: ``networks/lora_flux.py`` is one of it.

``networks/lora.py`` explains what a LoRA computes. Beside the network args of the table there are ``split_qkv``
(``networks/split_lora.py``), ``ggpo_sigma`` and ``ggpo_beta`` (``networks/ggpo.py``), ``verbose``, and those of
``networks.lora`` that are not about a U-Net; ``network_reg_dims`` gives ranks within the blocks that are adapted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.architectures.lora_table import LoraTable
from library.architectures.lora_target import LoraTarget
from library.errors import UserError
from networks import ggpo
from networks.base import NetworkPart
from networks.ggpo import PerturbedLoraModule, PerturbedSplitLoraModule
from networks.lora import LoraNetwork
from networks.lora_args import LoraArgs
from networks.lora_module import LoraModule
from networks.split_lora import SplitLoraModule, is_block_diagonal
from networks.targets import FoundModule, RankAlpha, find_modules, target_of
from networks.transformer_args import TransformerArgs, args_class
from networks.weights import write_weights

logger = logging.getLogger(__name__)

#: the entry of training states with GGPO's gradient norms
GRADIENT_NORMS = "ggpo_gradient_norms"


class TransformerLoraNetwork(LoraNetwork):
    """LoRA on a transformer and its text encoders; the network of a family is made by ``preset``."""

    table: ClassVar[LoraTable]
    args: TransformerArgs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters_changed()
        if self.args.verbose:
            for adapter in self.adapters:
                logger.info("%s: rank %d, alpha %g", adapter.lora_name, adapter.rank, adapter.scale * adapter.rank)

    def _adapters_changed(self) -> None:
        self.adapts_text_encoders = bool(self.text_encoder_loras)
        if self.args.perturbation is not None:
            rows = sum(adapter.rows for adapter in self.adapters)
            self.register_buffer(GRADIENT_NORMS, torch.zeros(rows, dtype=torch.float32))

    def apply_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Apply as the base class does; args without effect cause a warning."""
        for key, prefix in self.table.encoders.items():
            if prefix in self.args.encoders_on and not apply_text_encoder:
                logger.warning("--network_args %s=True has no effect with --network_train_unet_only", key)
        super().apply_to(text_encoder, unet, apply_text_encoder, apply_unet)
        self._adapters_changed()

    @classmethod
    def make_parts(
        cls, text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module, args: LoraArgs | None = None
    ) -> list[NetworkPart]:
        *encoders, denoiser = super().make_parts(text_encoder, unet, args)
        embedders = cls.table.embedders
        modules = dict(unet.named_modules())
        layers = tuple(name for name in embedders if name in modules)
        if isinstance(args, TransformerArgs):
            args.check_model(list(find_modules(unet, denoiser.target)), layers)
            layers = tuple(name for name in layers if args.embedder_dims[embedders.index(name)])
        denoiser.target = replace(denoiser.target, module_paths=layers)
        return [*encoders, denoiser]

    @classmethod
    def text_target(cls, text_encoder: nn.Module, args: LoraArgs | None) -> LoraTarget:
        target = target_of(text_encoder, cls.table.encoder_target(text_encoder))
        is_off = target.prefix in cls.table.encoders.values()
        if isinstance(args, TransformerArgs) and is_off and target.prefix not in args.encoders_on:
            return replace(target, module_classes=())
        return target

    @classmethod
    def size_in_file(
        cls, found: FoundModule, size: RankAlpha, weights: Mapping[str, Tensor], args: LoraArgs
    ) -> RankAlpha:
        """Return the size of a module's adapter; projections that are split in the file stay split, unless
        ``split_qkv`` is false."""
        assert isinstance(args, TransformerArgs)
        if size.dora is not None and (args.split_qkv or args.perturbation is not None):
            key = "split_qkv" if args.split_qkv else "ggpo_sigma"
            raise UserError(
                f"--network_args {key}: the file is a DoRA ({found.lora_name}), which excludes it; leave it out"
            )
        if not found.widths or size.dora is not None or args.split_qkv is False:
            return size
        up = weights.get(f"{found.lora_name}.lora_up.weight")
        # an untrained up half of zeros says nothing about splitting
        if up is not None and is_block_diagonal(up, found.widths) and (args.split_qkv or up.any()):
            return replace(size, widths=found.widths)
        if args.split_qkv:
            raise UserError(
                f"--network_args split_qkv=True: the projections of {found.lora_name} are not apart in the file; leave "
                "split_qkv out"
            )
        return size

    def make_adapter(self, found: FoundModule, size: RankAlpha, **settings: Any) -> LoraModule:
        perturbation = self.args.perturbation
        if perturbation is not None:
            kind = PerturbedSplitLoraModule if size.widths else PerturbedLoraModule
            return kind(found, size, perturbation=perturbation, **settings)
        if size.widths:
            return SplitLoraModule(found, size, **settings)
        return super().make_adapter(found, size, **settings)

    # ---- training ----

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return groups as in the base class; a learning rate of an encoder that is not trained is warned of."""
        rates = text_encoder_lr if isinstance(text_encoder_lr, (list, tuple)) else ()
        encoders = [part for part in self.parts if part.is_text_encoder]
        for part, rate in zip(encoders, rates if len(rates) > 1 else (), strict=False):
            if rate and rate != default_lr and not part.adapters:
                logger.warning(
                    "--text_encoder_lr: the rate %g of the %s has no effect, it is not trained", rate, part.label
                )
        return super().prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def begin_step(self, seed: int, step: int) -> None:
        """Draw the perturbations of the step."""
        if self.args.perturbation is not None:
            ggpo.begin_step(self._perturbed, self.ggpo_gradient_norms, seed, step)

    def before_update(self) -> None:
        """Keep the norms of the gradients for the next step's perturbations.

        With ``--fused_backward_pass`` it is called for each parameter by itself, the others having no gradient.
        """
        if self.args.perturbation is not None:
            ggpo.keep_gradient_norms(self._perturbed, self.ggpo_gradient_norms)

    @property
    def _perturbed(self) -> list[PerturbedLoraModule]:
        """Return all adapters if GGPO is on."""
        return [adapter for adapter in self.adapters if isinstance(adapter, PerturbedLoraModule)]

    # ---- states and files ----

    def load_weights_from(self, weights: Mapping[str, Tensor], source: str) -> str:
        """Load as in the base class. Also raises UserError for joint projections where training splits them."""
        for adapter in self.adapters:
            up = weights.get(f"{adapter.lora_name}.lora_up.weight")
            if isinstance(adapter, SplitLoraModule) and up is not None:
                adapter.check_apart(up, source)
        return super().load_weights_from(weights, source)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # files never have the norms, states do where the run had GGPO
        own, name = getattr(self, GRADIENT_NORMS, None), prefix + GRADIENT_NORMS
        if own is None:
            state_dict.pop(name, None)
        elif name not in state_dict:
            state_dict[name] = torch.zeros_like(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write as the base class does, without the norms of gradients, which only states need."""
        state = {name: tensor for name, tensor in self.state_dict().items() if name != GRADIENT_NORMS}
        write_weights(file, state, dtype, metadata)


def preset(name: str, module: str, table: LoraTable) -> type[TransformerLoraNetwork]:
    """Return the network class of one family.

    Args:
        name: of the class.
        module: the network module, as ``--network_module`` names it.
    """
    attributes = {
        "__module__": module,
        "__doc__": f"LoRA on {table.title} and its text encoders.",
        "module_name": module,
        "table": table,
        "args_class": args_class(table, module),
        "default_denoiser": table.denoiser,
    }
    return type(name, (TransformerLoraNetwork,), attributes)
