"""The base of all adapter networks: finding modules, hooking into them, merging, loading, saving, learning rates.

An adapter changes the output of one ``Linear`` or ``Conv2d`` of a frozen model. It replaces the ``forward`` of
that module *instance*, so the model's own weights never become part of the network: a network's state holds
adapter tensors only, named ``<lora_name>.<tensor>``. ``lora_name`` is the target's prefix and the module's path
with dots as underscores.

Shape legend: B batch, T tokens, r rank, in/out features or channels, (kh, kw) kernel.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.adapter_module import AdapterModule, Dropouts, merge_all_forever
from networks.file_names import published_names
from networks.part import NetworkPart
from networks.targets import FoundModule, RankAlpha, RankRule, check_rank, find_modules
from networks.weights import read_weights, refuse_other_model, select_weights, write_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RateGroup:
    """Adapters that share a learning rate: the part's rate times ``factor``, or ``rate``."""

    description: str
    factor: float
    adapters: Sequence[AdapterModule]
    rate: float | None = None  # whatever the part's is


class AdapterNetwork(nn.Module, ABC):
    """Adapters on the text encoders and the denoiser of one model; the public network protocol.

    Args:
        parts: the models to adapt, text encoders first in their order, then the denoiser.
        rank_rule: rank and alpha of each found module, or ``None`` to skip it.

    Raises:
        UserError: nothing to adapt was found.
    """

    module_name: str  # as in --network_module
    #: whether text encoders can get gradients
    adapts_text_encoders: bool = True
    #: why ``apply_max_norm_regularization`` is refused, if it is
    no_max_norm: str = ""

    def __init__(
        self,
        parts: Sequence[NetworkPart],
        rank_rule: RankRule,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts = Dropouts(),
    ) -> None:
        super().__init__()
        self.parts = list(parts)
        self.multiplier = multiplier
        for part in self.parts:
            for found in find_modules(part.model, part.target):
                size = rank_rule(found)
                if size is None:
                    continue
                check_rank(found, size.rank)
                if found.lora_name in self._modules:
                    raise ValueError(f"two modules are named {found.lora_name}; text encoders need their own prefixes")
                adapter = self.make_adapter(found, size, multiplier=multiplier, dropouts=dropouts)
                self.add_module(found.lora_name, adapter)
                part.adapters[found.path] = adapter
        if not self.adapters:
            models = ", ".join(type(part.model).__name__ for part in self.parts)
            raise UserError(f"{self.module_name} found nothing to adapt in {models}: another model family, or no ranks")

    @abstractmethod
    def make_adapter(
        self, found: FoundModule, size: RankAlpha, *, multiplier: float, dropouts: Dropouts
    ) -> AdapterModule:
        """Make the adapter of one module, not applied yet."""

    @property
    def adapters(self) -> list[AdapterModule]:
        return [adapter for part in self.parts for adapter in part.adapters.values()]

    @property
    def text_encoder_loras(self) -> list[AdapterModule]:
        return [a for part in self.parts if part.is_text_encoder for a in part.adapters.values()]

    @property
    def unet_loras(self) -> list[AdapterModule]:
        return [a for part in self.parts if not part.is_text_encoder for a in part.adapters.values()]

    # ---- applying ----

    def apply_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Hook the adapters into the given models. Parts that are not applied are removed from the network and its
        files."""
        self._bind(text_encoder, unet)
        for part in self.parts:
            if not (apply_text_encoder if part.is_text_encoder else apply_unet):
                for adapter in part.adapters.values():
                    delattr(self, adapter.lora_name)
                part.adapters = {}
            for adapter in part.adapters.values():
                adapter.apply_to_original()
            if part.adapters:
                logger.info("%s: %d adapters on the %s", self.module_name, len(part.adapters), part.label)

    def remove(self) -> None:
        """Remove all hooks from the models."""
        for adapter in self.adapters:
            adapter.remove_from_original()

    def _bind(self, text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module) -> None:
        """Adapt the same modules of these models from now on; they may differ from those at creation."""
        text_encoders = as_list(text_encoder)
        expected = sum(part.is_text_encoder for part in self.parts)
        if len(text_encoders) != expected:
            raise ValueError(f"the network was made for {expected} text encoder(s), {len(text_encoders)} given")
        remaining = iter(text_encoders)
        for part in self.parts:
            part.model = next(remaining) if part.is_text_encoder else unet
            for path, adapter in part.adapters.items():
                adapter.bind(part.model.get_submodule(path))

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for adapter in self.adapters:
            adapter.multiplier = multiplier

    def set_enabled(self, enabled: bool) -> None:
        for adapter in self.adapters:
            adapter.enabled = enabled

    # ---- merging ----

    def is_mergeable(self) -> bool:
        return True

    def merge_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Merge the adapters into the models' weights for good, at the network's multiplier.

        Args:
            weights_sd: weights to load first; missing parts are not merged. ``None``: the present weights.
            dtype: of the changed weights; default: unchanged. Sums are computed in float32 on ``device``.
        """
        merge_all_forever(self.adapters_to_merge(text_encoder, unet, weights_sd), device, dtype)

    def adapters_to_merge(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None,
    ) -> list[AdapterModule]:
        """Return the adapters that ``merge_to`` merges: those of these models, with these weights."""
        self._bind(text_encoder, unet)
        if weights_sd is None:
            return self.adapters
        weights_sd = self.published_names(weights_sd)
        self.load_weights_from(weights_sd, "the weights to merge")
        present = {key.split(".", 1)[0] for key in weights_sd}
        return [adapter for adapter in self.adapters if adapter.lora_name in present]

    def merge(self) -> None:
        """Merge the adapters into the models' weights, reversibly; hooked forwards then add nothing."""
        for adapter in self.adapters:
            adapter.merge()

    def unmerge(self) -> None:
        """Undo ``merge`` bit for bit. Networks merged into one model may be unmerged in any order."""
        for adapter in self.adapters:
            adapter.unmerge()

    def backup_weights(self) -> None:
        """Part of the published protocol; ``pre_calculation`` keeps the models' weights by itself."""

    def pre_calculation(self) -> None:
        """Merge adapters that are not merged yet, for faster inference."""
        for adapter in self.adapters:
            if not adapter.is_merged:
                adapter.merge()

    def restore_weights(self) -> None:
        """Unmerge merged adapters."""
        for adapter in self.adapters:
            if adapter.is_merged:
                adapter.unmerge()

    # ---- training ----

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: adapters are inside the models' blocks and are recomputed with them."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Give gradients only to parameters with a learning rate."""
        for adapter in self.adapters:
            adapter.requires_grad_(adapter.trained)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        self.train()

    def on_step_start(self) -> None:
        """Hook of the protocol for networks whose shape changes from step to step."""

    def begin_step(self, seed: int, step: int) -> None:
        """Hook of this project, before each batch of a training step: random numbers of the step depend on these two
        only.

        Args:
            seed: of the run.
            step: counted from 0; batches that are accumulated share it.
        """

    def before_update(self) -> None:
        """Hook of this project, once per step, before the optimizer uses the gradients: averaged, clipped, finite or
        0."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for an optimizer, and a description of each, e.g. ``"unet"``, ``"unet plus"``.

        Args:
            text_encoder_lr: a rate for each text encoder; the last one is for all further ones too.
            unet_lr: of the denoiser.
            default_lr: used where a learning rate is ``None``; if it is ``None`` too, the optimizer's own is used.

        A rate of 0 leaves the part untrained: no group, no gradients.

        Raises:
            UserError: there are more learning rates than text encoders, or all learning rates are 0.
        """
        groups: list[dict[str, Any]] = []
        descriptions: list[str] = []
        for part, rate in self._rates_of_parts(text_encoder_lr, unet_lr):
            for rate_group in self.rate_groups(part):
                for suffix, group in self._groups_at_rate(part, rate_group, default_lr if rate is None else rate):
                    groups.append(group)
                    descriptions.append(rate_group.description + suffix)
        if not groups:
            raise UserError("nothing to train: --learning_rate, --unet_lr and --text_encoder_lr leave every rate at 0")
        return groups, descriptions

    def _rates_of_parts(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None
    ) -> Iterator[tuple[NetworkPart, float | None]]:
        """Yield each part with its learning rate. Raises UserError if there are more rates than text encoders."""
        count = sum(part.is_text_encoder for part in self.parts)
        rates: list[Any] = list(text_encoder_lr) if isinstance(text_encoder_lr, (list, tuple)) else [text_encoder_lr]
        if len(rates) > max(1, count):
            counts = f"{len(rates)} values, and text encoders are {count}"
            raise UserError(f"--text_encoder_lr has {counts}; give one for all, or one for each")
        rates += (rates[-1:] or [None]) * (count - len(rates))
        remaining = iter(rates)
        for part in self.parts:
            yield part, next(remaining) if part.is_text_encoder else unet_lr

    def _groups_at_rate(
        self, part: NetworkPart, rate_group: RateGroup, part_rate: float | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (description suffix, optimizer group) of adapters that share a rate; none if they are not trained."""
        rate = part_rate if rate_group.rate is None else rate_group.rate
        trained = rate != 0 and rate_group.factor != 0
        for adapter in rate_group.adapters:
            adapter.trained = trained
            adapter.requires_grad_(trained)
        for suffix, ratio, parameters in self.split_parameters(part, rate_group.adapters) if trained else ():
            if rate is None and rate_group.factor * ratio != 1:
                raise UserError(f"{part.label}: rates relative to others need a learning rate to start from")
            if parameters:
                given = {} if rate is None else {"lr": rate * rate_group.factor * ratio}
                yield suffix, {"params": parameters, **given}

    def rate_groups(self, part: NetworkPart) -> list[RateGroup]:
        """Divide a part's adapters by learning rate; one group unless a subclass overrides it."""
        return [RateGroup(part.label, 1.0, list(part.adapters.values()))]

    def split_parameters(
        self, part: NetworkPart, adapters: Sequence[AdapterModule]
    ) -> list[tuple[str, float, list[nn.Parameter]]]:
        """Return (description suffix, factor of the learning rate, parameters); one entry unless a subclass overrides
        it."""
        return [("", 1.0, [parameter for adapter in adapters for parameter in adapter.parameters()])]

    # ---- norms ----

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """Return the Frobenius norms (adapters,) of the weight changes at multiplier 1, on the device."""
        return torch.stack([adapter.change_norm() for adapter in self.adapters])

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale down the adapters whose weight change has a norm above ``max_norm`` (``--scale_weight_norms``).

        The work is done on the parameters' device and nothing waits for it: the results are 0-dimensional tensors,
        moved to ``device`` if one is given.

        Returns:
            The number of scaled adapters, and the mean and greatest norm afterwards.
        """
        norms = self.weight_norms()  # (adapters,)
        ratios = (max_norm / norms).clamp(max=1.0)  # a norm of 0 gives inf, clamped to 1
        for adapter, ratio in zip(self.adapters, ratios.unbind(), strict=True):
            adapter.scale_change(ratio)
        scaled = norms * ratios
        metrics = ((ratios < 1).sum(), scaled.mean(), scaled.max())
        return metrics if device is None else tuple(metric.to(device) for metric in metrics)

    # ---- files ----

    def load_weights(self, file: str | Path) -> str:
        """Load a ``.safetensors``, ``.pt`` or ``.ckpt`` file; returns a line for people.

        Raises:
            UserError: unreadable, or its tensors are not those of this network.
        """
        for part in self.parts:
            refuse_other_model(file, part.target)
        return self.load_weights_from(read_weights(file), str(file))

    def load_weights_from(self, weights: Mapping[str, Tensor], source: str) -> str:
        """Load tensors in the published names, or in diffusers', with their alphas, so that a file means the same
        anywhere.

        A part of the network that the file lacks completely keeps its weights; tensors of parts that are not trained
        here are skipped. The returned line says both.

        Raises:
            UserError: tensors are missing, unknown, or of other shapes.
        """
        selected, notes = select_weights(self, self.published_names(weights), source)
        self.load_state_dict(selected, strict=False)
        message = f"loaded {len(selected)} tensors from {source}" + "".join(f"; {note}" for note in notes)
        logger.info("%s", message)
        return message

    def published_names(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors with diffusers' or PEFT's names under this network's names; others keep theirs."""
        return self.names_in(self.parts, weights)

    @classmethod
    def names_in(cls, parts: Sequence[NetworkPart], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the same for a network that will be made of ``parts``."""
        return published_names(weights, [(part.model, part.target) for part in parts])

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the network's tensors atomically; ``.safetensors`` files carry the metadata and two hashes.

        Args:
            dtype: of all tensors, alphas included; ``None`` keeps theirs.

        Raises:
            UserError: unknown file extension.
        """
        write_weights(file, self.state_dict(), dtype, metadata)


def as_list(models: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if models is None:
        return []
    return [model for model in models if model is not None] if isinstance(models, (list, tuple)) else [models]
