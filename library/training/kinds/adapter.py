"""Adapters: LoRA and any other module with the public network-module protocol."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.config.console import quiet
from library.data.batch import Batch
from library.errors import UserError
from library.files.atomic import make_folder
from library.optim.param_groups import default_descriptions
from library.optim.update import Metrics
from library.randomness import key
from library.training.fingerprint import content_of
from library.training.kinds.adapter_options import DECLARATION, TrainNetworkOptions
from library.training.kinds.base import Kind, ParameterGroup
from library.training.models import Models
from library.training.network_module import NetworkModule
from library.training.precision import cast_trained, trained_dtype
from networks.merge_together import merge_together
from networks.third_party import refuse_wrong_merge, text_argument
from networks.third_party_trial import check_states, fault_of, keep_states_plain, try_saving

logger = logging.getLogger(__name__)

#: network args that give parameters other learning rates than their part's, of our own and of third-party modules
_LR_ARGS = (
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "down_lr_weight", "mid_lr_weight",
    "up_lr_weight", "network_reg_lrs",
)  # fmt: skip


class Adapter(Kind[TrainNetworkOptions]):
    """Networks of ``--network_module`` within the frozen denoiser and text encoders."""

    declaration = DECLARATION
    options_class = TrainNetworkOptions
    modelspec_suffix = "/lora"
    minimum_metadata = (
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    )
    keeps_copies = True
    starts_from = "--network_weights"

    def __init__(
        self,
        architecture: Architecture,
        options: TrainNetworkOptions,
        checkpoint: Any,
        *,
        seed: int,
        sharded: bool = False,
    ) -> None:
        super().__init__(architecture, options, checkpoint, seed=seed, sharded=sharded)
        self._module = NetworkModule.of(options.network)
        self._args = dict(self._module.args)  # including args that the network needed beside the given ones
        self._network: Any = None
        self._models: Models | None = None
        self._multiplier = 1.0
        self._trains_text = not options.network.network_train_unet_only

    # ---- before anything is loaded ----

    @classmethod
    def check_options(cls, architecture: Architecture, options: TrainNetworkOptions) -> None:
        NetworkModule.of(options.network).check(architecture.denoiser_target)

    @classmethod
    def trained_encoders(cls, architecture: Architecture, options: TrainNetworkOptions) -> tuple[bool, ...]:
        return architecture.adapted_encoders(options.network)

    @classmethod
    def learning_rate_flags(cls, options: TrainNetworkOptions) -> list[str]:
        given = [word.partition("=")[0].strip() for word in options.network.network_args or []]
        rates = ("unet_lr", "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2")
        flags = [f"--{name}" for name in rates if getattr(options.optimizer, name) not in (None, [])]
        return flags + [name for name in _LR_ARGS if name in given]

    @classmethod
    def fingerprint(cls, options: TrainNetworkOptions) -> dict[str, object]:
        return {"--base_weights": [content_of(path) for path in options.network.base_weights or []]}

    @classmethod
    def shaping_options(cls, options: TrainNetworkOptions) -> list[str]:
        rank = [] if options.network.dim_from_weights else ["network_dim"]
        return ["network_module", *rank, "network_train_unet_only", "network_train_text_encoder_only"]

    def check_models(self, models: Models) -> None:
        # the run's own network logs its messages; where a network cannot be made without weights, or a third-party one
        # may only lack them, it is checked then, too
        try:
            with quiet(logging.WARNING):
                network = self._applied_on_meta(models)
                self._groups(network)
        except UserError as error:
            if self._module.is_ours or error.__cause__ is None:
                raise
        except Exception as error:
            if self._module.is_ours and not isinstance(error, RuntimeError):
                raise
        else:
            self._check_states(network)

    # ---- setting up ----

    def change_models(self, models: Models, *, dtype: torch.dtype, device: torch.device) -> None:
        """Merge ``--base_weights``."""
        to_merge = []
        for path, multiplier, merged in self._module.base_networks(models):
            refuse_wrong_merge(self.options.network.module, merged.network, merged.weights, multiplier)
            to_merge.append(merged)
            logger.info("merging %s into the base model with multiplier %s", path, multiplier)
        merge_together(to_merge, text_argument(models.text_encoders), dtype=dtype, device=str(device))

    def attach(self, models: Models) -> list[ParameterGroup]:
        network = self._applied(models)
        self._check_states(network)
        half = trained_dtype(self.options.training)
        if half != torch.float32:
            cast_trained(network, half)
        if self.options.training.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        groups = self._groups(network)
        with self._module.naming("to prepare its gradients"):
            network.prepare_grad_etc(*self._module.models(models))
        network.train()
        self._network, self._models = network, models
        return groups

    def attach_on_meta(self, models: Models) -> list[ParameterGroup]:
        try:
            network = self._applied_on_meta(models)
        except RuntimeError:  # NotImplementedError is one
            network = self._applied_off_meta(models)
        self._check_states(network)
        return self._groups(network)

    def _applied_on_meta(self, models: Models) -> Any:
        with warnings.catch_warnings(), torch.device("meta"):
            # weights to start from are checked against the network, but the meta device cannot hold them
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            if self._module.is_ours:  # others may need weights, which are missing here
                for _ in self._module.base_networks(models):
                    pass  # a file that does not fit is an error
            return self._applied(models)

    def _applied_off_meta(self, models: Models) -> Any:
        """Make a third-party network that computes with tensors during its creation, on uninitialized weights."""
        try:
            return self._applied(models)
        except RuntimeError:
            # a DoRA computes norms of the weights: uninitialized memory replaces them
            for model in (*models.text_encoders, models.denoiser):
                model.to_empty(device="cpu")
            return self._applied(models)

    def _applied(self, models: Models) -> Any:
        """Create the network, hook it into the models and load the weights that it starts from."""
        options = self.options.network
        torch.manual_seed(key(self.seed, "init"))  # third-party modules draw from the global generator
        network, more = self._module.create(models, sharded=self.sharded)
        self._args |= more
        self._trains_text = not options.network_train_unet_only and getattr(network, "adapts_text_encoders", True)
        text, denoiser = self._module.models(models)
        with self._module.naming("to adapt the models"):
            network.apply_to(text, denoiser, self._trains_text, not options.network_train_text_encoder_only)
        if not self._module.is_ours:
            keep_states_plain(network)
        self._refuse_adapted_but_cached(models)
        if options.network_weights is not None:
            with self._module.naming(f"to load {options.network_weights}"):
                loaded = network.load_weights(options.network_weights)
            logger.info("network weights %s: %s", options.network_weights, loaded)
        return network

    def _check_states(self, network: Any) -> None:
        if self._module.is_ours:
            return
        output, resume = self.options.output, self.options.resume
        saves, name = output.save_state or output.save_state_on_train_end, self.options.network.module
        check_states(network, name, resumes=bool(resume.resume), saves_states=saves)

    def try_saving(self, path: Path, dtype: torch.dtype | None) -> None:
        if self._module.is_ours:
            return
        make_folder(path.parent)
        name = self.options.network.module
        try_saving(self._network, name, path.parent, suffix=path.suffix, dtype=dtype)

    def _refuse_adapted_but_cached(self, models: Models) -> None:
        """Refuse adapters on a text encoder whose outputs are cached, which would have no effect."""
        left_out = (e for e, used in zip(models.text_encoders, models.encoding, strict=True) if used is None)
        # adapters, third-party ones too, replace the forward of instances
        if any("forward" in vars(module) for encoder in left_out for module in encoder.modules()):
            raise UserError(
                f"--network_module {self.options.network.network_module}: it adapts a text encoder whose outputs are "
                "cached; remove --cache_text_encoder_outputs and --cache_text_encoder_outputs_to_disk"
            )

    def _groups(self, network: Any) -> list[ParameterGroup]:
        rates = self.options.optimizer
        groups, names = self._module.parameter_groups(
            network,
            # of more learning rates than text encoders, the first ones are used: config/rules.py warns
            text_lrs=(rates.text_encoder_lrs or [])[: len(self.architecture.text_encoder_targets)] or None,
            unet_lr=rates.unet_lr,
            default_lr=rates.learning_rate,
        )
        if names is None:
            names = default_descriptions(len(groups), trains_text_encoder=self._trains_text)
        names = [*names, *[None] * (len(groups) - len(names))]
        return [ParameterGroup(group, name) for group, name in zip(groups, names, strict=False)]

    def modules(self) -> Sequence[nn.Module]:
        return [self._network] if self._network is not None else []

    def before_update(self) -> None:
        if hasattr(self._network, "before_update"):
            self._network.before_update()

    # ---- the step ----

    @property
    def trains_text(self) -> bool:
        return self._trains_text

    def begin_epoch(self, epoch: int) -> None:
        assert self._models is not None
        with self._module.naming("to begin an epoch"):
            self._network.on_epoch_start(*self._module.models(self._models))

    def begin_batch(self, batch: Batch, step: int) -> None:
        if hasattr(self._network, "on_step_start"):
            self._network.on_step_start()
        if hasattr(self._network, "begin_step"):
            self._network.begin_step(self.seed, step)
        self.begin_validation_batch(batch)

    def begin_validation_batch(self, batch: Batch) -> None:
        if batch.network_multiplier == self._multiplier:
            return
        if not hasattr(self._network, "set_multiplier"):
            raise UserError(
                f"network_multiplier: networks of {self.options.network.network_module} have one strength; leave it "
                "out of the dataset"
            )
        self._multiplier = batch.network_multiplier
        self._network.set_multiplier(self._multiplier)

    def after_step(self, step: int, device: torch.device) -> Metrics:
        limit = self.options.network.scale_weight_norms
        if not limit:
            return {}
        scaled, mean, maximum = self._network.apply_max_norm_regularization(limit, device)
        norms = {"max_norm/keys_scaled": scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": maximum}
        return {name: torch.as_tensor(value, device=device) for name, value in norms.items()}

    def fault_of(self, error: Exception) -> str:
        return fault_of(self._module.module.__name__, error)

    # ---- files and records ----

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], *, step: int, epoch: int
    ) -> None:
        with self._module.naming(f"to save {path}"):
            self._network.save_weights(str(path), dtype, dict(metadata))

    def metadata(self) -> dict[str, object]:
        network, rates = self.options.network, self.options.optimizer
        text_lrs = rates.text_encoder_lrs
        entries: dict[str, object] = {
            "ss_unet_lr": rates.unet_lr,
            # --text_encoder_lr takes several; a single one is recorded as a number, as published
            "ss_text_encoder_lr": text_lrs[0] if text_lrs and len(text_lrs) == 1 else text_lrs,
            "ss_network_module": network.network_module,
            "ss_network_dim": network.network_dim,
            "ss_network_alpha": float(network.network_alpha),
            "ss_network_dropout": network.network_dropout,
            "ss_scale_weight_norms": network.scale_weight_norms,
        }
        arguments: dict[str, object] = dict(self._args)
        if arguments and not network.dim_from_weights:
            arguments.setdefault("dropout", network.network_dropout)
        return entries | ({"ss_network_args": json.dumps(arguments)} if arguments else {})

    def rows(self, count: int) -> list[tuple[str, str]]:
        options = self.options.network
        rank = (
            "ranks from the weights"
            if options.dim_from_weights
            else f"rank {options.network_dim}, alpha {options.network_alpha:g}"
        )
        trained = (("text encoder", self._trains_text), ("denoiser", not options.network_train_text_encoder_only))
        return [
            ("network", f"{options.network_module}, {rank}"),
            ("trained", f"{count:,} parameters in {' and '.join(name for name, on in trained if on)}"),
        ]
