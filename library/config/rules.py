"""Rules between options: one small function each, all checked at once before anything is loaded.

A rule yields ``error(...)`` for what cannot work and ``warning(...)`` for what is unusual. Options without effect have
rules of their own in ``library/config/no_effect/``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.arguments import TrainNetworkOptions, flat
from library.config.availability import NO_NVME, NO_STAGE_3, NOT_WITH_DEEPSPEED, REFUSED
from library.config.mistakes import home_hint
from library.config.no_effect import as_errors, without_effect
from library.data.dataset_keys import NOT_WITH_CACHED_LATENTS
from library.errors import UserError
from library.files.hub import REPO_TYPES
from library.launched import USE_DEEPSPEED, is_on, process_count

if TYPE_CHECKING:
    from library.architectures.base import Architecture


@dataclass(frozen=True)
class Finding:
    text: str
    fatal: bool


def error(text: str) -> Finding:
    return Finding(text, fatal=True)


def warning(text: str) -> Finding:
    return Finding(text, fatal=False)


Rule = Callable[[TrainNetworkOptions], Iterator[Finding]]


def check(
    options: TrainNetworkOptions, architecture: Architecture, *, rules: Sequence[Rule] | None = None
) -> list[str]:
    """Apply every rule and the family's own, or those given, such as ``DATA_RULES``; returns the warnings.

    Raises:
        UserError: all errors, one line each; with ``--strict``, options without effect among them.
    """
    # one line for an option that both refuse; the family knows its own reason better
    findings = list(_refused(options, {**REFUSED, **architecture.refused_options}))
    # what changes nothing with this family cannot be at fault
    effective = without(options, architecture.idle_options)
    for rule in (*RULES, *architecture.option_rules) if rules is None else rules:
        findings += rule(effective)
    if rules is None:
        for family_rule in (cached_texts, text_rates, numbered_rates, attention_package):
            findings += family_rule(effective, architecture)
    idle = without_effect(options, architecture)
    errors = [finding.text for finding in findings if finding.fatal]
    errors += as_errors(idle) if options.config.strict else []
    if errors:
        raise UserError("\n".join(errors))
    return [*(finding.text for finding in findings), *idle]


def without(options: TrainNetworkOptions, names: Collection[str]) -> TrainNetworkOptions:
    """The same with the named options at their defaults."""
    changed = {}
    for group_field in dataclasses.fields(options):
        group = getattr(options, group_field.name)
        reset = {field.name: field.default for field in dataclasses.fields(group) if field.name in names}
        if reset:
            changed[group_field.name] = dataclasses.replace(group, **reset)
    return dataclasses.replace(options, **changed)


def _refused(options: TrainNetworkOptions, table: Mapping[str, str]) -> Iterator[Finding]:
    for field, value in flat(options):
        if field.name in table and value != field.default:
            yield error(f"--{field.name}: {table[field.name]}")


# ---- what must be there ----


def needs_model(o: TrainNetworkOptions) -> Iterator[Finding]:
    if not o.model.pretrained_model_name_or_path:
        yield error("--pretrained_model_name_or_path: name the base model: a file, a Diffusers folder, or a Hub id")


def needs_network(o: TrainNetworkOptions) -> Iterator[Finding]:
    if not o.network.network_module:
        yield error("--network_module: name what is trained, e.g. networks.lora")


def needs_output(o: TrainNetworkOptions) -> Iterator[Finding]:
    if not o.output.output_dir:
        yield error("--output_dir: name the folder for the results")
    folders = {"output_dir": o.output.output_dir, "logging_dir": o.logging.logging_dir}
    for flag, folder in ((flag, Path(given)) for flag, given in folders.items() if given):
        # the folder itself, or the nearest that exists of those it will be made in
        standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not standing.is_dir():
            yield error(f"--{flag} {folder}: {standing} is a file, not a folder")
        elif not os.access(standing, os.W_OK):
            yield error(f"--{flag} {folder}: {standing} may not be written to; name another folder")
        if hint := home_hint(folder):
            yield error(f"--{flag} {folder}{hint}")
    name = o.output.output_name
    if name and Path(name).name != name:
        yield error(f"--output_name {name}: a name without folders; put the folder into --output_dir")
    elif name and Path(name).suffix in (".safetensors", ".ckpt", ".pt"):
        yield warning(f"--output_name {name}: files get their ending by themselves; leave {Path(name).suffix} out")


def needs_data(o: TrainNetworkOptions) -> Iterator[Finding]:
    d = o.dataset
    if d.dataset_config is None and not d.train_data_dir and not d.in_json:
        yield error("no data: name a dataset file with --dataset_config, or a folder with --train_data_dir")


def files_exist(o: TrainNetworkOptions) -> Iterator[Finding]:
    """The model and its VAE are left to the architecture, which also takes Hub ids."""
    files = [
        ("dataset_config", o.dataset.dataset_config),
        ("network_weights", o.network.network_weights),
        *(("base_weights", path) for path in o.network.base_weights or []),
        ("sample_prompts", o.sample.sample_prompts if o.sample.is_asked_for else None),
        ("log_tracker_config", o.logging.log_tracker_config),
    ]
    thumbnail = o.modelspec.metadata_thumbnail
    if thumbnail and not thumbnail.startswith("data:"):
        files.append(("metadata_thumbnail", thumbnail))
    # beside a dataset file these have no effect
    folders: list[tuple[str, str | None]] = []
    if not o.dataset.dataset_config:
        files.append(("in_json", o.dataset.in_json))
        folders.append(("train_data_dir", o.dataset.train_data_dir))
        if not o.dataset.in_json:
            folders.append(("reg_data_dir", o.dataset.reg_data_dir))
    if o.dataset.conditioning_data_dir:
        folders.append(("conditioning_data_dir", o.dataset.conditioning_data_dir))
    if not o.resume.resume_from_huggingface:  # then it is no path
        folders.append(("resume", o.resume.resume))
    for name, path in files:
        if path and not Path(path).is_file():
            what = "a folder, not a file" if Path(path).is_dir() else f"no such file{home_hint(path)}"
            yield error(f"--{name} {path}: {what}")
    for name, path in folders:
        if path and not Path(path).is_dir():
            what = "a file, not a folder" if Path(path).is_file() else f"no such folder{home_hint(path)}"
            yield error(f"--{name} {path}: {what}")


# ---- what excludes each other ----


def network_parts(o: TrainNetworkOptions) -> Iterator[Finding]:
    n = o.network
    if n.network_train_unet_only and n.network_train_text_encoder_only:
        yield error("--network_train_unet_only and --network_train_text_encoder_only exclude each other")


def network_files(o: TrainNetworkOptions) -> Iterator[Finding]:
    n = o.network
    if n.dim_from_weights and not n.network_weights:
        yield error("--dim_from_weights: needs --network_weights, the file to take ranks from")
    if n.base_weights_multiplier and len(n.base_weights_multiplier) > len(n.base_weights or []):
        yield error("--base_weights_multiplier: more values than --base_weights files")


def rates(o: TrainNetworkOptions) -> Iterator[Finding]:
    """Rates of 0 leave a part as it is; without any other, a run would end when its models are loaded."""
    n, chosen = o.network, o.optimizer
    if n.network_train_unet_only and n.network_train_text_encoder_only:
        return  # which is an error of its own
    if any(word.partition("=")[0].strip() == "network_reg_lrs" for word in n.network_args or []):
        return  # rates that replace those of the parts
    denoiser = chosen.learning_rate if chosen.unet_lr is None else chosen.unet_lr
    text = max(chosen.text_encoder_lr or [chosen.learning_rate])
    if (n.network_train_text_encoder_only or denoiser == 0) and (n.network_train_unet_only or text == 0):
        yield error("nothing to train: --learning_rate, --unet_lr and --text_encoder_lr leave every rate at 0")


#: below it an adapter changes next to nothing in a usual run; the published default, 2e-6, is for whole models
_LOW_LEARNING_RATE = 5e-6


def low_learning_rate(o: TrainNetworkOptions) -> Iterator[Finding]:
    """A default that no one should train with; optimizers that find the learning rate warn by themselves."""
    n, chosen = o.network, o.optimizer
    name, words = chosen.optimizer_type.lower().rpartition(".")[2], chosen.optimizer_args or []
    finds_it = name.startswith(("dadapt", "prodigy")) or (
        name == "adafactor" and not any(word.replace(" ", "") == "relative_step=False" for word in words)
    )
    if (
        not n.network_module
        or finds_it
        or any(word.partition("=")[0].strip() == "network_reg_lrs" for word in n.network_args or [])
    ):
        return
    highest: dict[str, float] = {}
    if not n.network_train_text_encoder_only:
        highest |= {"learning_rate": chosen.learning_rate} if chosen.unet_lr is None else {"unet_lr": chosen.unet_lr}
    if not n.network_train_unet_only:
        given = chosen.text_encoder_lrs
        highest |= {"text_encoder_lr": max(given)} if given else {"learning_rate": chosen.learning_rate}
    option, value = max(highest.items(), key=lambda item: item[1], default=("", 0.0))
    if 0 < value < _LOW_LEARNING_RATE:
        default = " (the default)" if value == type(chosen).learning_rate else ""
        yield warning(
            f"--{option} {value:g}{default}: teaches an adapter next to nothing; 1e-4 is usual (docs/first_lora.md)"
        )


def optimizer_names(o: TrainNetworkOptions) -> Iterator[Finding]:
    chosen = o.optimizer
    if sum((bool(chosen.optimizer_type), chosen.use_8bit_adam, chosen.use_lion_optimizer)) > 1:
        yield error("--optimizer_type, --use_8bit_adam and --use_lion_optimizer exclude each other: give one")


def averaging(o: TrainNetworkOptions) -> Iterator[Finding]:
    decay = o.optimizer.ema_decay
    if decay is None:
        return
    if not 0 < decay < 1:
        yield error(f"--ema_decay {decay}: must be above 0 and below 1; 0.999 is common")


def half_precision(o: TrainNetworkOptions) -> Iterator[Finding]:
    t = o.training
    if t.full_fp16 and t.full_bf16:
        yield error("--full_fp16 and --full_bf16 exclude each other: give one")
        return
    for name, precision in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(t, name) and t.mixed_precision != precision:
            yield error(f"--{name}: needs --mixed_precision {precision}; add it, or remove --{name}")


def fused_backward(o: TrainNetworkOptions) -> Iterator[Finding]:
    """What needs all gradients at once does not go with updating each parameter as its gradient comes."""
    if not o.optimizer.fused_backward_pass:
        return
    if o.optimizer.max_grad_norm > 0:
        yield error("--fused_backward_pass: the gradient cannot be clipped as a whole; add --max_grad_norm 0")
    if o.training.gradient_accumulation_steps > 1:
        yield warning(
            "--fused_backward_pass: saves little memory with --gradient_accumulation_steps, as the gradients of all "
            "weights are kept between the batches of a step; remove one of them"
        )
    if o.training.mixed_precision == "fp16":
        yield error("--fused_backward_pass: not with --mixed_precision fp16, whose steps may be left out; use bf16")
    if o.training.on_nan != "stop":
        yield error(
            f"--fused_backward_pass: not with --on_nan {o.training.on_nan}, as the update is made before all gradients "
            "are judged; remove one of them"
        )
    if process_count() > 1:
        yield error("--fused_backward_pass: not with several processes, which average whole gradients; remove it")


def deepspeed(o: TrainNetworkOptions) -> Iterator[Finding]:
    """What accelerate's configuration says of it is checked by ``library.training.zero``."""
    if o.training.deepspeed and o.training.zero_stage == 3:
        yield error(f"--zero_stage 3: {NO_STAGE_3}")
    if o.training.deepspeed and o.training.offload_optimizer_device == "nvme":
        yield error(f"--offload_optimizer_device nvme: {NO_NVME}")
    if not (o.training.deepspeed or is_on(USE_DEEPSPEED)):
        return
    for name in ("full_bf16", "full_fp16", "fused_backward_pass"):
        if getattr(o.optimizer if name == "fused_backward_pass" else o.training, name):
            yield error(f"--{name}: {NOT_WITH_DEEPSPEED[name]}")


def cached_latents(o: TrainNetworkOptions) -> Iterator[Finding]:
    d = o.dataset
    if d.cache_latents or d.cache_latents_to_disk:
        for name in NOT_WITH_CACHED_LATENTS:
            if getattr(d, name):
                yield error(f"--{name}: not with cached latents, which are made once; remove one of them")


def cached_texts(o: TrainNetworkOptions, architecture: Architecture) -> Iterator[Finding]:
    """A rule that depends on the family: of some, encoders are trained beside cached outputs of others."""
    d = o.dataset
    if not (d.cache_text_encoder_outputs or d.cache_text_encoder_outputs_to_disk):
        return
    flag = "--cache_text_encoder_outputs" + ("_to_disk" if d.cache_text_encoder_outputs_to_disk else "")
    if all(architecture.adapted_encoders(o.network)):
        yield error(
            f"{flag}: not while the text encoder is trained, whose outputs change; "
            "add --network_train_unet_only, or remove it"
        )
    if o.network.base_weights:
        yield error(
            f"{flag}: not with --base_weights, which may change the text encoder; merge them into the model first, "
            "or remove one of them"
        )


def text_rates(o: TrainNetworkOptions, architecture: Architecture) -> Iterator[Finding]:
    """Programs write two learning rates for every model: those beyond the last text encoder are not used."""
    given = o.optimizer.text_encoder_lr or []
    if o.network.network_train_unet_only or len(given) <= 1:
        return
    there = len(architecture.text_encoder_targets)
    numbers = f"--text_encoder_lr has {len(given)} values, and the model has {there} text encoder{'s'[: there != 1]}"
    if len(given) < there:
        yield error(f"{numbers}; give one for all, or {there}")
    elif set(given[there:]) - set(given[:there]):  # the same value written twice loses nothing
        yield warning(f"{numbers}: {' '.join(f'{lr:g}' for lr in given[:there])} is used")


def attention_package(o: TrainNetworkOptions, architecture: Architecture) -> Iterator[Finding]:
    t = o.training
    if "xformers" in architecture.refused_options or t.sdpa or t.mem_eff_attn:
        return  # then it is an error anyway
    if t.xformers and importlib.util.find_spec("xformers") is None:
        yield error("--xformers: the package xformers is not installed; pip install xformers, or use --sdpa")


def numbered_rates(o: TrainNetworkOptions, architecture: Architecture) -> Iterator[Finding]:
    """A rule that depends on the family: ``--text_encoder_lr1`` and ``2`` are for models with two encoders."""
    names = ("text_encoder_lr1", "text_encoder_lr2")
    given = ", ".join(f"--{name}" for name in names if getattr(o.optimizer, name) is not None)
    if not given:
        return
    if (count := len(architecture.text_encoder_targets)) != len(names):
        yield error(f"{given}: for models with two text encoders, this one has {count}; use --text_encoder_lr")
    elif o.optimizer.text_encoder_lr:
        yield error(f"{given}: not with --text_encoder_lr, which sets the same rates; remove one of them")


# ---- numbers ----


def finite_numbers(o: TrainNetworkOptions) -> Iterator[Finding]:
    for field, value in flat(o):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield error(f"--{field.name} {number}: must be a finite number")


def positive_numbers(o: TrainNetworkOptions) -> Iterator[Finding]:
    at_least_one = {
        "max_train_steps": o.training.max_train_steps,
        "max_train_epochs": o.training.max_train_epochs,
        "gradient_accumulation_steps": o.training.gradient_accumulation_steps,
        "train_batch_size": o.dataset.train_batch_size,
        "vae_batch_size": o.dataset.vae_batch_size,
        "text_encoder_batch_size": o.dataset.text_encoder_batch_size,
        "text_encoder_cache_variants": o.dataset.text_encoder_cache_variants,
        "network_dim": o.network.network_dim,
        "save_every_n_epochs": o.output.save_every_n_epochs,
        "save_every_n_steps": o.output.save_every_n_steps,
        "save_n_epoch_ratio": o.output.save_n_epoch_ratio,
        "save_last_n_epochs": o.output.save_last_n_epochs,
        "save_last_n_steps": o.output.save_last_n_steps,
        "save_last_n_epochs_state": o.output.save_last_n_epochs_state,
        "save_last_n_steps_state": o.output.save_last_n_steps_state,
        "clip_skip": o.model.clip_skip,
        "lr_scheduler_num_cycles": o.scheduler.lr_scheduler_num_cycles,
        "ddp_timeout": o.training.ddp_timeout,
        "validate_every_n_steps": o.validation.validate_every_n_steps,
        "validate_every_n_epochs": o.validation.validate_every_n_epochs,
        "max_validation_steps": o.validation.max_validation_steps,
        "early_stopping_patience": o.validation.early_stopping_patience,
        "initial_epoch": o.resume.initial_epoch,
    }
    at_least_zero = {
        "max_data_loader_n_workers": o.dataset.max_data_loader_n_workers,
        "keep_tokens": o.dataset.keep_tokens,
        "learning_rate": o.optimizer.learning_rate,
        "unet_lr": o.optimizer.unet_lr,
        "text_encoder_lr1": o.optimizer.text_encoder_lr1,
        "text_encoder_lr2": o.optimizer.text_encoder_lr2,
        "max_grad_norm": o.optimizer.max_grad_norm,
        "network_alpha": o.network.network_alpha,
        "prior_loss_weight": o.loss.prior_loss_weight,
        "min_snr_gamma": o.loss.min_snr_gamma,
        "v_pred_like_loss": o.loss.v_pred_like_loss,
        "ip_noise_gamma": o.noise.ip_noise_gamma,
        "multires_noise_iterations": o.noise.multires_noise_iterations,
        "multires_noise_discount": o.noise.multires_noise_discount,
        "dataset_repeats": o.dataset.dataset_repeats,
        "initial_step": o.resume.initial_step,
    }
    optional = {field.name for field, _ in flat(o) if field.default is None}
    for least, options in ((1, at_least_one), (0, at_least_zero)):
        for name, value in options.items():
            if value is not None and value < least:
                yield error(f"--{name} {value}: must be at least {least}" + ", or left out" * (name in optional))
    for rate in o.optimizer.text_encoder_lr or []:
        if rate < 0:
            yield error(f"--text_encoder_lr {rate}: must be at least 0")
    if o.network.scale_weight_norms is not None and o.network.scale_weight_norms <= 0:
        yield error(f"--scale_weight_norms {o.network.scale_weight_norms}: must be greater than 0")
    shares = {
        "network_dropout": o.network.network_dropout,
        "caption_dropout_rate": o.dataset.caption_dropout_rate,
        "caption_tag_dropout_rate": o.dataset.caption_tag_dropout_rate,
    }
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            yield error(f"--{name} {value}: must lie between 0 and 1")


def timestep_range(o: TrainNetworkOptions) -> Iterator[Finding]:
    low = o.noise.min_timestep if o.noise.min_timestep is not None else 0
    high = o.noise.max_timestep if o.noise.max_timestep is not None else 1000
    if not 0 <= low < high <= 1000:
        yield error(f"--min_timestep {low} and --max_timestep {high}: 0 <= min < max <= 1000 must hold")


# ---- what needs something else ----


def v_prediction(o: TrainNetworkOptions) -> Iterator[Finding]:
    if o.loss.scale_v_pred_loss_like_noise_pred and not o.model.v_parameterization:
        yield error("--scale_v_pred_loss_like_noise_pred: only for models that predict v (--v_parameterization)")
    if o.loss.v_pred_like_loss and o.model.v_parameterization:
        yield error("--v_pred_like_loss: only for models that predict noise; remove it or --v_parameterization")
    if o.noise.zero_terminal_snr and not o.model.v_parameterization:
        yield warning("--zero_terminal_snr is meant for models that predict v (--v_parameterization)")


def huber(o: TrainNetworkOptions) -> Iterator[Finding]:
    if o.loss.huber_c <= 0 or o.loss.huber_scale <= 0:
        yield error("--huber_c and --huber_scale: must be greater than 0")


def clip_skip(o: TrainNetworkOptions) -> Iterator[Finding]:
    if o.model.v2 and o.model.clip_skip is not None:
        yield warning("--clip_skip is unusual with --v2, which uses the last but one layer already")


def hub(o: TrainNetworkOptions) -> Iterator[Finding]:
    kind, visibility = o.output.huggingface_repo_type, o.output.huggingface_repo_visibility
    if kind not in (None, *REPO_TYPES):
        yield error(f"--huggingface_repo_type {kind}: files go into one of type {' or '.join(REPO_TYPES)}")
    if visibility not in (None, "public", "private"):
        yield warning(f"--huggingface_repo_visibility {visibility}: taken as private; write public or private")


RULES: tuple[Rule, ...] = (
    needs_model,
    needs_network,
    needs_output,
    needs_data,
    files_exist,
    network_parts,
    network_files,
    rates,
    low_learning_rate,
    optimizer_names,
    averaging,
    half_precision,
    fused_backward,
    deepspeed,
    cached_latents,
    finite_numbers,
    positive_numbers,
    timestep_range,
    v_prediction,
    huber,
    clip_skip,
    hub,
)

#: what must hold to look at the data alone, without a model and without training
DATA_RULES: tuple[Rule, ...] = (
    needs_data,
    files_exist,
    cached_latents,
    finite_numbers,
    positive_numbers,
)
