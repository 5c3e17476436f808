"""Training of adapters: LoRA and whatever else speaks the public network-module protocol."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.base import Conditioning
from library.config.arguments import TrainNetworkOptions
from library.config.console import quiet
from library.data import describe
from library.data.dataset import Batch
from library.errors import UserError, naming
from library.files.atomic import make_folder
from library.optim.fused_backward import one_by_one
from library.optim.param_groups import default_descriptions
from library.optim.schedulers import scheduler_name
from library.optim.update import Metrics, Update
from library.randomness import key
from library.training.checkpoints import ema_path
from library.training.meta_models import load_on_meta
from library.training.metadata import HashedFile, RunRecord, fixed_entries
from library.training.precision import Fp8Parts, cast_trained, trained_dtype
from library.training.run import Run
from library.training.settings import update_settings
from library.training.text_caching import caches_texts, uncached
from library.training.text_memo import TextMemo
from library.training.trainer import Trainer
from library.training.zero import zero_of, zero_rows
from networks.merge_together import Merged, merge_together
from networks.module_names import import_network_module
from networks.third_party import (
    denoiser_argument,
    is_ours,
    refuse_wrong_merge,
    text_argument,
)
from networks.third_party_trial import check_states, keep_states_plain, make_network, naming_module, try_saving
from networks.weights import check_adapter_file

logger = logging.getLogger(__name__)

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_network_args(arguments: list[str] | None) -> dict[str, str]:
    """``key=value`` words to a dict of texts.

    Raises:
        UserError: a word without ``=``.
    """
    parsed: dict[str, str] = {}
    for word in arguments or []:
        name, separator, value = word.partition("=")
        if not separator or not name.strip():
            raise UserError(f"--network_args {word!r}: write it as key=value")
        parsed[name.strip()] = value.strip()
    return parsed


def _models_for_network(run: Run) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """Text encoders and denoiser as functions of network modules take them."""
    denoiser = denoiser_argument(run.options.network.network_module, run.denoiser)
    return text_argument(run.text_encoders), denoiser


class NetworkTrainer(Trainer):
    """Train an adapter (such as LoRA) for the model's denoiser and text encoders."""

    # ---- before anything is loaded ----

    def check_trained(self, options: TrainNetworkOptions) -> None:
        network = options.network
        module = import_network_module(network.network_module)
        arguments = parse_network_args(network.network_args)
        check_args = getattr(module, "check_network_args", None)
        if check_args is not None:
            check_args(arguments, self.architecture.denoiser_target)
        needs_file = (
            "--base_weights" if network.base_weights else "--dim_from_weights" if network.dim_from_weights else ""
        )
        if needs_file and not hasattr(module, "create_network_from_weights"):
            raise UserError(f"{needs_file}: {network.network_module} has no create_network_from_weights; leave it out")
        for flag, paths in (("network_weights", [network.network_weights]), ("base_weights", network.base_weights)):
            for path in filter(None, paths or []):
                with naming(f"--{flag}", path):
                    check_adapter_file(Path(path))

    def check_before_caching(self, run: Run) -> None:
        """Make the network over models without weights: what does not fit the model is wrong before caches are made."""
        dataset = run.options.dataset
        if not (run.caches_latents or caches_texts(dataset)):
            return
        module, probe = import_network_module(run.options.network.network_module), replace(run)
        ours = is_ours(module.__name__)
        load_on_meta(self.architecture, probe)
        # what is said of a network is said when the run's own is made; where a network cannot be made without weights,
        # or a third-party one may only lack them, it is left to that, too
        try:
            with quiet(logging.WARNING):
                network = self._applied_on_meta(probe, module)
                self._parameter_groups(network, run.options)
        except UserError as error:
            if ours or error.__cause__ is None:
                raise
        except Exception as error:
            if ours and not isinstance(error, RuntimeError):
                raise
        else:
            self._check_states(probe, network)

    # ---- setting up ----

    def build_update(self, run: Run) -> Update:
        options = run.options
        module = import_network_module(options.network.network_module)
        self._merge_base_weights(run, module)
        Fp8Parts.of(options).apply(run)
        network = self._applied_network(run, module)
        self._check_states(run, network)
        half = trained_dtype(options.training)
        if half != torch.float32:
            cast_trained(network, half)
        if options.training.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        groups, names = self._parameter_groups(network, options)
        with self._naming(run, "to prepare its gradients"):
            network.prepare_grad_etc(*_models_for_network(run))
        self._try_saving(run, network)
        accelerator = run.accelerator
        # evaluation_mode: placed and saved by the accelerator, but not wrapped for data parallelism;
        # the adapters work inside the frozen model's forward, see gradient_exchange.py
        self._network = accelerator.prepare_model(network, evaluation_mode=True)
        self._network.train()
        self._memo = None if self._trains_text else TextMemo(lambda tokens: self._encode(run, tokens))
        self._on_step_start = getattr(network, "on_step_start", None)
        self._multiplier = 1.0
        run.record = self._record(run)
        settings = update_settings(
            options,
            seed=run.checked.seed,
            total_steps=run.plan.total_steps,
            zero=zero_of(options.training, accelerator),
        )
        fused = options.optimizer.fused_backward_pass
        return Update(
            accelerator,
            run.checked.optimizer,
            groups,
            run.checked.learning_rate_schedule,
            settings,
            names=names,
            averaged={name: p for name, p in network.named_parameters() if p.requires_grad},
            fused=one_by_one([p for group in groups for p in group["params"]]) if fused else None,
            before_update=getattr(network, "before_update", None),
        )

    def trained_on_meta(self, run: Run) -> list[tuple[str, list[nn.Parameter]]]:
        module = import_network_module(run.options.network.network_module)
        try:
            network = self._applied_on_meta(run, module)
        except RuntimeError:  # NotImplementedError is one
            network = self._applied_off_meta(run, module)
        self._check_states(run, network)
        groups, descriptions = self._parameter_groups(network, run.options)
        named = zip(groups, descriptions, strict=False)
        return [(name or "network", list(group["params"])) for group, name in named]

    def _applied_on_meta(self, run: Run, module: ModuleType) -> Any:
        with warnings.catch_warnings(), torch.device("meta"):
            # weights to start from are checked against the network, but there is nothing to copy them to
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            if is_ours(module.__name__):  # others may need the weights that are not there
                for _ in self._base_networks(run, module):
                    pass  # a file that does not fit is an error
            return self._applied_network(run, module)

    def _applied_off_meta(self, run: Run, module: ModuleType) -> Any:
        """For third-party modules that compute with tensors while they are made, with those of the models last."""
        try:
            return self._applied_network(run, module)
        except RuntimeError:
            # a DoRA takes the norms of the weights: memory that nothing has filled stands for them
            for model in (*run.text_encoders, run.denoiser):
                model.to_empty(device="cpu")
            return self._applied_network(run, module)

    def _applied_network(self, run: Run, module: ModuleType) -> Any:
        """Create the network, hook it into the models and load the weights it starts from."""
        options = run.options.network
        self._network_args = parse_network_args(options.network_args)
        torch.manual_seed(key(run.checked.seed, "init"))  # third-party modules draw from the global generator
        network = self._create_network(run, module)
        self._trains_text = not options.network_train_unet_only and getattr(network, "adapts_text_encoders", True)
        self._trains_denoiser = not options.network_train_text_encoder_only
        text, denoiser = _models_for_network(run)
        with self._naming(run, "to adapt the models"):
            network.apply_to(text, denoiser, self._trains_text, self._trains_denoiser)
        if not is_ours(module.__name__):
            keep_states_plain(network)
        self._refuse_adapted_but_cached(run)
        self._begin_step = getattr(network, "begin_step", None)
        self._steps_done = run.start_step
        if options.network_weights is not None:
            with self._naming(run, f"to load {options.network_weights}"):
                loaded = network.load_weights(options.network_weights)
            logger.info("network weights %s: %s", options.network_weights, loaded)
        return network

    @contextlib.contextmanager
    def _naming(self, run: Run, doing: str) -> Iterator[None]:
        """Name the module of a third-party network in what it raises; ours say themselves what is wrong."""
        module = run.options.network.network_module
        with contextlib.nullcontext() if is_ours(module) else naming_module(module, doing):
            yield

    def _check_states(self, run: Run, network: Any) -> None:
        options = run.options
        if not is_ours(options.network.network_module):
            output = options.output
            saves = output.save_state or output.save_state_on_train_end
            module = options.network.network_module
            check_states(network, module, resumes=bool(options.resume.resume), saves_states=saves)

    def _try_saving(self, run: Run, network: Any) -> None:
        module, output = run.options.network.network_module, run.options.output
        if is_ours(module) or not run.accelerator.is_main_process:
            return
        final = run.names.final()
        make_folder(final.parent)
        dtype = SAVE_DTYPES.get(output.save_precision or "")
        try_saving(network, module, final.parent, suffix=final.suffix, dtype=dtype)

    def _refuse_adapted_but_cached(self, run: Run) -> None:
        """What an adapter makes of a text encoder whose outputs are cached would never be seen."""
        left_out = (e for e, used in zip(run.text_encoders, uncached(self.architecture, run), strict=True) if not used)
        # adapters, third-party ones too, replace the forward of instances
        if any("forward" in vars(module) for encoder in left_out for module in encoder.modules()):
            raise UserError(
                f"--network_module {run.options.network.network_module}: it adapts a text encoder whose outputs are "
                "cached; remove --cache_text_encoder_outputs and --cache_text_encoder_outputs_to_disk"
            )

    def _create_network(self, run: Run, module: ModuleType) -> Any:
        options = run.options.network
        text, denoiser = _models_for_network(run)
        create = module.create_network_from_weights if options.dim_from_weights else module.create_network
        arguments: dict[str, Any] = dict(self._network_args)
        # the published protocol names the dropout twice: our modules take neuron_dropout, others read "dropout"
        if "neuron_dropout" in inspect.signature(create).parameters:
            arguments["neuron_dropout"] = options.network_dropout
        elif options.network_dropout is not None:
            arguments.setdefault("dropout", options.network_dropout)
        sizes = (options.network_weights,) if options.dim_from_weights else (options.network_dim, options.network_alpha)

        def make(more: Mapping[str, str]) -> Any:
            made = create(1.0, *sizes, run.vae, text, denoiser, **{**arguments, **more})
            return made[0] if options.dim_from_weights else made

        network, more = make_network(module.__name__, make, self._network_args)
        self._network_args |= more
        if network is None:
            raise UserError(f"--network_module {options.network_module}: it created no network for these options")
        if options.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
            raise UserError(f"--scale_weight_norms: networks of {options.network_module} cannot do it; leave it out")
        if options.scale_weight_norms and run.sharding is not None and not is_ours(module.__name__):
            raise UserError(
                f"--scale_weight_norms: not with FSDP and {options.network_module}, which may read weights that are "
                "shared out; remove one of them"
            )
        if options.scale_weight_norms and (reason := getattr(network, "no_max_norm", "")):
            raise UserError(f"--scale_weight_norms: {reason}; leave it out")
        return network

    def _merge_base_weights(self, run: Run, module: ModuleType) -> None:
        to_merge = []
        for path, multiplier, merged in self._base_networks(run, module):
            refuse_wrong_merge(run.options.network.network_module, merged.network, merged.weights, multiplier)
            to_merge.append(merged)
            logger.info("merging %s into the base model with multiplier %s", path, multiplier)
        merge_together(to_merge, text_argument(run.text_encoders), dtype=run.weight_dtype, device=str(run.device))

    def _base_networks(self, run: Run, module: ModuleType) -> Iterator[tuple[str, float, Merged]]:
        """For each file of ``--base_weights``: file, strength, network of it."""
        options = run.options.network
        multipliers = list(options.base_weights_multiplier or [])
        text, denoiser = _models_for_network(run)
        for index, path in enumerate(options.base_weights or []):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            network, weights = module.create_network_from_weights(
                multiplier, path, run.vae, text, denoiser, for_inference=True
            )
            yield path, multiplier, Merged(network, weights, denoiser)

    def _parameter_groups(self, network: Any, options: TrainNetworkOptions) -> tuple[list[Any], list[str | None]]:
        """Ask the network for its groups in the newest form of the protocol that it speaks."""
        # of more learning rates than text encoders, the first ones are used: config/rules.py warns
        text_lrs = (options.optimizer.text_encoder_lrs or [])[: len(self.architecture.text_encoder_targets)] or None
        unet_lr, default = options.optimizer.unet_lr, options.optimizer.learning_rate
        if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
            groups = network.prepare_optimizer_params_with_multiple_te_lrs(text_lrs, unet_lr, default)
        else:
            if text_lrs and len(set(text_lrs)) > 1:
                module = options.network.network_module
                logger.warning(
                    "networks of %s take one learning rate for all text encoders: %g is used", module, text_lrs[0]
                )
            text_lr = text_lrs[0] if text_lrs else None
            takes_default = len(inspect.signature(network.prepare_optimizer_params).parameters) >= 3
            groups = network.prepare_optimizer_params(text_lr, unet_lr, *([default] if takes_default else []))
        descriptions = None
        if isinstance(groups, tuple):
            groups, descriptions = groups
        # some networks give iterators of parameters, which are used up by the first look
        groups = [{**group, "params": list(group["params"])} for group in groups]
        if not groups:
            raise UserError("nothing would be trained: every learning rate is 0 or no module is adapted")
        if descriptions is None:
            descriptions = default_descriptions(len(groups), trains_text_encoder=self._trains_text)
        return groups, list(descriptions)

    # ---- the step ----

    def encode_text(self, run: Run, batch: Batch) -> Conditioning:
        if batch.text is not None:
            # some encoders may be trained beside the cached outputs of the others
            moved = {name: t.to(run.device, non_blocking=True) for name, t in batch.tokens.items()}
            return Conditioning({**batch.text, **(self._encode(run, moved).tensors if moved else {})})
        if self._memo is not None:
            return self._memo(batch.tokens, run.device)
        return self._encode(run, {name: t.to(run.device, non_blocking=True) for name, t in batch.tokens.items()})

    def _encode(self, run: Run, tokens: Mapping[str, Tensor]) -> Conditioning:
        with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
            encoders = uncached(self.architecture, run)
            return self.architecture.encode_text(encoders, tokens, clip_skip=run.options.model.clip_skip)

    def epoch_started(self, run: Run, epoch: int) -> None:
        with self._naming(run, "to begin an epoch"):
            self._network.on_epoch_start(*_models_for_network(run))

    def batch_started(self, run: Run, batch: Batch) -> None:
        if self._on_step_start is not None:
            self._on_step_start()
        if self._begin_step is not None:
            self._begin_step(run.checked.seed, self._steps_done)
        self.validation_batch_started(run, batch)

    def validation_batch_started(self, run: Run, batch: Batch) -> None:
        if batch.network_multiplier != self._multiplier:
            if not hasattr(self._network, "set_multiplier"):
                module = run.options.network.network_module
                raise UserError(
                    f"network_multiplier: networks of {module} have one strength; leave it out of the dataset"
                )
            self._multiplier = batch.network_multiplier
            self._network.set_multiplier(self._multiplier)

    def step_ended(self, run: Run, step: int) -> Metrics:
        self._steps_done = step
        limit = run.options.network.scale_weight_norms
        metrics: Metrics = {}
        if limit:
            scaled, mean, maximum = self._network.apply_max_norm_regularization(limit, run.device)
            norms = {"max_norm/keys_scaled": scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": maximum}
            metrics = {name: torch.as_tensor(value, device=run.device) for name, value in norms.items()}
        return metrics

    def training_mode(self, run: Run, training: bool) -> None:
        self._network.train(training)
        if run.update is not None:
            run.update.training_mode(training)

    def trained_modules(self, run: Run) -> list[nn.Module]:
        return [self._network]

    # ---- records ----

    def _record(self, run: Run) -> RunRecord:
        import random

        options = run.options
        arguments: dict[str, object] = dict(self._network_args)
        if arguments and not options.network.dim_from_weights:
            arguments.setdefault("dropout", options.network.network_dropout)
        fixed = fixed_entries(
            options,
            self.architecture,
            run.checked.info,
            # identifies the session only; not part of the run's reproducible randomness
            session_id=random.SystemRandom().randint(0, 2**32),
            started_at=run.started_at,
            seed=run.checked.seed,
            num_epochs=run.plan.num_epochs,
            total_steps=run.plan.total_steps,
            optimizer_name=run.checked.optimizer.metadata_name,
            scheduler_name=scheduler_name(run.checked.optimizer, run.checked.learning_rate_schedule),
            network_args=arguments,
            data=describe.metadata(
                run.data,
                from_file=options.dataset.dataset_config is not None,
                world_size=run.accelerator.num_processes,
                gradient_accumulation_steps=options.training.gradient_accumulation_steps,
            ),
        )
        vae = options.model.vae
        return RunRecord(
            options=options,
            architecture=self.architecture,
            info=run.checked.info,
            model_file=HashedFile.of(options.model.pretrained_model_name_or_path),
            vae_file=HashedFile.of(vae) if vae else None,
            fixed=fixed,
            network_args=arguments,
        )

    def write_weights(self, run: Run, path: Path, *, step: int, epoch: int) -> None:
        make_folder(path.parent)
        dtype = SAVE_DTYPES.get(run.options.output.save_precision or "")
        network = run.accelerator.unwrap_model(self._network)
        metadata = run.record.at_save(step=step, epoch=epoch)
        with self._naming(run, f"to save {path}"):
            network.save_weights(str(path), dtype, metadata)
        if (average := run.update.average) is not None:
            with average.applied():
                told = {} if run.options.output.no_metadata else {"ss_ema_decay": str(average.decay)}
                network.save_weights(str(ema_path(path)), dtype, metadata | told)

    def trained_rows(self, run: Run) -> list[tuple[str, str]]:
        trained = sum(p.numel() for p in run.parameters)
        parts = [name for name, on in (("text encoder", self._trains_text), ("denoiser", self._trains_denoiser)) if on]
        options = run.options.network
        rank = (
            "ranks from the weights"
            if options.dim_from_weights
            else f"rank {options.network_dim}, alpha {options.network_alpha:g}"
        )
        rows = [
            ("network", f"{options.network_module}, {rank}"),
            ("trained", f"{trained:,} parameters in {' and '.join(parts)}"),
        ]
        if (decay := run.options.optimizer.ema_decay) is not None:
            rows.append(("average", f"decay {decay:g}, saved as {ema_path(run.names.final()).name}"))
        return rows + zero_rows(run)
