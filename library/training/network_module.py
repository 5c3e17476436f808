"""The trainer's side of the public network-module protocol: ``networks.lora``, LyCORIS and others."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from library.architectures.lora_target import LoraTarget
from library.errors import UserError, naming
from library.training.kinds.adapter_options import NetworkOptions
from library.training.models import Models
from networks.merge_together import Merged
from networks.module_names import import_network_module
from networks.third_party import denoiser_argument, is_ours, text_argument
from networks.third_party_trial import make_network, naming_module
from networks.weights import check_adapter_file

logger = logging.getLogger(__name__)


def parse_network_args(arguments: list[str] | None) -> dict[str, str]:
    """Parse ``key=value`` words into a dict of strings.

    Raises:
        UserError: a word without ``=``, or a key with two values.
    """
    parsed: dict[str, str] = {}
    for word in arguments or []:
        name, separator, value = word.partition("=")
        if not separator or not name.strip():
            raise UserError(f"--network_args {word!r}: write it as key=value")
        name, value = name.strip(), value.strip()
        if (before := parsed.setdefault(name, value)) != value:
            raise UserError(f"--network_args: {name} is given as {before!r} and as {value!r}; give it once")
    return parsed


@dataclass(frozen=True)
class NetworkModule:
    """A network module with the options of its networks."""

    module: ModuleType
    options: NetworkOptions
    args: Mapping[str, str]  # --network_args

    @staticmethod
    def of(options: NetworkOptions) -> NetworkModule:
        """Import the module. Raises UserError: no such module, or arguments that are no ``key=value``."""
        module = import_network_module(options.module)
        return NetworkModule(module, options, parse_network_args(options.network_args))

    @property
    def is_ours(self) -> bool:
        return is_ours(self.module.__name__)

    @contextlib.contextmanager
    def naming(self, doing: str) -> Iterator[None]:
        """Add the module's name to errors of a third-party network; our modules raise their own errors."""
        with contextlib.nullcontext() if self.is_ours else naming_module(self.options.module, doing):
            yield

    def check(self, target: LoraTarget) -> None:
        """Refuse arguments and files that cannot work with the denoiser. Raises UserError."""
        options = self.options
        check_args = getattr(self.module, "check_network_args", None)
        if check_args is not None:
            check_args(dict(self.args), target)
        needs_file = (
            "--base_weights" if options.base_weights else "--dim_from_weights" if options.dim_from_weights else ""
        )
        if needs_file and not hasattr(self.module, "create_network_from_weights"):
            raise UserError(f"{needs_file}: {options.network_module} has no create_network_from_weights; leave it out")
        for flag, paths in (("network_weights", [options.network_weights]), ("base_weights", options.base_weights)):
            for path in filter(None, paths or []):
                with naming(f"--{flag}", path):
                    check_adapter_file(Path(path))

    def models(self, models: Models) -> tuple[nn.Module | list[nn.Module], nn.Module]:
        """Return text encoders and denoiser as arguments of network modules."""
        denoiser = denoiser_argument(self.options.module, models.denoiser)
        return text_argument(models.text_encoders), denoiser

    def create(self, models: Models, *, sharded: bool) -> tuple[Any, Mapping[str, str]]:
        """Make a network for the models; returns it with the arguments that it needed beside the given ones.

        Raises:
            UserError: the module cannot make one with these options.
        """
        options = self.options
        text, denoiser = self.models(models)
        create = self.module.create_network_from_weights if options.dim_from_weights else self.module.create_network
        arguments: dict[str, Any] = dict(self.args)
        # the published protocol names the dropout twice: our modules take neuron_dropout, others read "dropout"
        if "neuron_dropout" in inspect.signature(create).parameters:
            arguments["neuron_dropout"] = options.network_dropout
        elif options.network_dropout is not None:
            arguments.setdefault("dropout", options.network_dropout)
        sizes = (options.network_weights,) if options.dim_from_weights else (options.network_dim, options.network_alpha)

        def make(more: Mapping[str, str]) -> Any:
            made = create(1.0, *sizes, models.vae, text, denoiser, **{**arguments, **more})
            return made[0] if options.dim_from_weights else made

        network, more = make_network(self.module.__name__, make, self.args)
        if network is None:
            raise UserError(f"--network_module {options.network_module}: it created no network for these options")
        if options.scale_weight_norms:
            self._check_norms(network, sharded=sharded)
        return network, more

    def _check_norms(self, network: Any, *, sharded: bool) -> None:
        name = self.options.network_module
        if not hasattr(network, "apply_max_norm_regularization"):
            raise UserError(f"--scale_weight_norms: networks of {name} cannot do it; leave it out")
        if sharded and not self.is_ours:
            raise UserError(
                f"--scale_weight_norms: not with sharded weights (FSDP, ZeRO stage 3) and {name}, which may read them; "
                "remove one of them"
            )
        if reason := getattr(network, "no_max_norm", ""):
            raise UserError(f"--scale_weight_norms: {reason}; leave it out")

    def base_networks(self, models: Models) -> Iterator[tuple[str, float, Merged]]:
        """Yield path, strength and network for each file of ``--base_weights``."""
        multipliers = list(self.options.base_weights_multiplier or [])
        text, denoiser = self.models(models)
        for index, path in enumerate(self.options.base_weights or []):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            network, weights = self.module.create_network_from_weights(
                multiplier, path, models.vae, text, denoiser, for_inference=True
            )
            yield path, multiplier, Merged(network, weights, denoiser)

    def parameter_groups(
        self, network: Any, *, text_lrs: Sequence[float] | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[Any], list[str | None] | None]:
        """Ask the network for its groups in the newest form of the protocol that it supports.

        Returns:
            Groups for optimizers, and their names, if the network has any.

        Raises:
            UserError: nothing to train.
        """
        if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
            groups = network.prepare_optimizer_params_with_multiple_te_lrs(text_lrs, unet_lr, default_lr)
        else:
            if text_lrs and len(set(text_lrs)) > 1:
                name = self.options.network_module
                logger.warning(
                    "networks of %s take one learning rate for all text encoders: %g is used", name, text_lrs[0]
                )
            text_lr = text_lrs[0] if text_lrs else None
            takes_default = len(inspect.signature(network.prepare_optimizer_params).parameters) >= 3
            groups = network.prepare_optimizer_params(text_lr, unet_lr, *([default_lr] if takes_default else []))
        names = None
        if isinstance(groups, tuple):
            groups, names = groups
        groups = list(groups)
        if not groups:
            raise UserError("nothing would be trained: every learning rate is 0 or no module is adapted")
        return groups, None if names is None else list(names)
