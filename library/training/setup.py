"""Set up a run: check everything, cheapest first, scan the data, count steps."""

from __future__ import annotations

import time
from dataclasses import replace

from library.architectures.base import Architecture
from library.architectures.model_info import ModelInfo
from library.config.arguments import OptimizerOptions, RunOptions
from library.config.console import setup_console
from library.config.no_effect import report
from library.config.rules import check as check_rules
from library.data.conditioning import Role, check_roles
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.idle_options import without_effect_on_data
from library.data.unread_captions import unread_captions
from library.diffusion.objective import Objective
from library.files.atomic import recover_directory
from library.files.hub import Uploads, check_target
from library.launched import is_first_process
from library.optim.optimizers import OptimizerChoice, resolve_optimizer
from library.optim.schedule_checks import check_scheduler
from library.training import precision
from library.training.caching import inspect_model
from library.training.checkpoints import OutputNames
from library.training.idle_options import without_effect_in_plan
from library.training.kinds.base import Kind, RunSubject
from library.training.processes import choose_seed, make_accelerator, of_main_process, weight_dtype
from library.training.resume import check_fits, read_state
from library.training.run import Checked, Run
from library.training.settings import (
    for_model,
    hub_target,
    noise_settings,
    run_plan,
    sample_prompts,
    save_policy,
    schedule_settings,
    state_folder,
    tracker_settings,
)
from library.training.sharding import check_trained, sharding_for
from library.training.text_caching import caches_texts
from library.training.update_checks import check_update
from library.training.validation import check_validation
from library.training.zero import check_zero


def images_as(architecture: Architecture, kind: type[Kind]) -> Role:
    """Return the role of the images in ``conditioning_data_dir``."""
    return "image" if architecture.takes_images or kind.takes_images else "mask"


def objective_of(architecture: Architecture, options: RunOptions, info: ModelInfo) -> Objective:
    """Return the objective of a run."""
    return architecture.objective(v_prediction=info.v_prediction, zero_terminal_snr=options.noise.zero_terminal_snr)


def cached_encoders(architecture: Architecture, kind: type[Kind], options: RunOptions) -> tuple[bool, ...]:
    """For each text encoder, return whether its outputs come from a cache."""
    caches = caches_texts(options.dataset)
    live = architecture.live_encoders(kind.trained_encoders(architecture, options))
    return tuple(caches and not runs for runs in live)


def set_up(architecture: Architecture, kind: type[Kind], options: RunOptions) -> Run:
    """Check everything, scan the data, and set up the run; no weights are loaded.

    Args:
        architecture: configured with the options.

    Raises:
        UserError: one line for each finding.
    """
    setup_console(options.console)
    options = architecture.normalized(kind.normalized(options))
    architecture = architecture.configured(options)
    strict = options.config.strict
    checked = check(architecture, kind, options)
    architecture = checked.architecture
    accelerator = make_accelerator(
        options.training, backends=checked.trackers.backends, directory=checked.trackers.directory
    )
    report(precision.check_device(options.training, accelerator.device), strict=strict)
    flag = kind.fused_flag(options)
    report(
        check_update(options, checked.optimizer, checked.resumed, accelerator.device, fused_flag=flag), strict=strict
    )
    report(check_zero(options, checked.optimizer, accelerator), strict=strict)
    checked = replace(checked, seed=of_main_process(checked.seed))
    data = TrainingData(
        checked.dataset_config,
        seed=checked.seed,
        latent=architecture.latent,
        prior_loss_weight=options.loss.prior_loss_weight,
        conditioning_as=images_as(architecture, kind),
        order=checked.resumed.order if checked.resumed is not None else "by step",
    )
    kind.check_data(options, data)
    plan, start_step = run_plan(
        options,
        batches_per_epoch=data.batches_per_process(accelerator.num_processes),
        resumed=checked.resumed,
    )
    report(without_effect_in_plan(options, plan), strict=strict)
    output = options.output
    extension = kind.extension(architecture, options, checked.checkpoint)
    names = OutputNames(output.folder, output.output_name, extension)
    kind.check_place(architecture, checked.checkpoint, names.final())
    sharding = sharding_for(options.training, accelerator, strict=strict)
    if sharding is not None:
        check_trained(
            kind(architecture, options, checked.checkpoint, seed=checked.seed, sharded=True),
            checked.optimizer,
            sharding,
        )
    return Run(
        checked=checked,
        kind=kind,
        accelerator=accelerator,
        data=data,
        plan=plan,
        names=names,
        policy=save_policy(options, plan),
        objective=objective_of(architecture, options, checked.info),
        weight_dtype=weight_dtype(options.training),
        started_at=time.time(),
        start_step=start_step,
        uploads=Uploads(checked.hub if accelerator.is_main_process else None),
        cached_encoders=cached_encoders(architecture, kind, options),
        sharding=sharding,
    )


def check(architecture: Architecture, kind: type[Kind], options: RunOptions) -> Checked:
    """Refuse runs that cannot work, cheapest checks first.

    Raises:
        UserError: one line for each finding.
    """
    strict = options.config.strict
    if options.resume.resume:
        recover_directory(options.resume.resume)
    report(check_rules(options, RunSubject(kind, architecture)), strict=strict)
    dataset_config = load_dataset_config(options.dataset.dataset_config, options.dataset, options.validation)
    dataset_config = kind.prepared_data(options, dataset_config)
    report((*without_effect_on_data(options, dataset_config), *unread_captions(dataset_config)), strict=strict)
    check_roles(dataset_config, images_as(architecture, kind), masked_loss=options.loss.masked_loss)
    optimizer = _optimizer(kind, options)
    schedule = schedule_settings(options)
    report((*optimizer.warnings, *check_scheduler(optimizer, schedule)), strict=strict)
    kind.check_options(architecture, options)
    prompts = sample_prompts(options, architecture, reads_images=kind.takes_images)
    folder = state_folder(options)
    resumed = read_state(folder) if folder else None
    if resumed is not None:
        shaping = [*kind.shaping_options(options), *architecture.shaping_options]
        check_fits(resumed, options, optimizer, shaping=shaping, starts_from=kind.starts_from)
    check_validation(dataset_config, options.validation, resumed)
    trackers = tracker_settings(options, default_name=kind.tracker_name)
    report(trackers.check(), strict=strict)
    checkpoint = inspect_model(architecture, options.model)
    architecture = architecture.for_model(checkpoint)
    resolutions = [dataset.buckets.resolution for dataset in dataset_config.datasets]
    architecture = architecture.for_resolutions(resolutions)
    architecture.check_options(options, checkpoint.info)
    kind.check_checkpoint(architecture, options, checkpoint)
    prompts = for_model(prompts, architecture)
    objective = objective_of(architecture, options, checkpoint.info)
    objective.check(noise_settings(options).timesteps)
    for prompt in prompts:
        objective.sampler(prompt.sample_sampler, options.sample.sample_sampler)
    hub = hub_target(options)
    if hub is not None and is_first_process():
        hub = check_target(hub, create=not options.config.dry_run)
    return Checked(
        options=options,
        architecture=architecture,
        dataset_config=dataset_config,
        checkpoint=checkpoint,
        info=checkpoint.info,
        optimizer=optimizer,
        learning_rate_schedule=schedule,
        prompts=prompts,
        state_folder=folder,
        resumed=resumed,
        trackers=trackers,
        hub=hub,
        seed=choose_seed(options.training.seed, resumed.seed if resumed else None),
    )


def _optimizer(kind: type[Kind], options: RunOptions) -> OptimizerChoice:
    chosen = options.optimizer
    return resolve_optimizer(
        chosen.optimizer_type,
        chosen.use_8bit_adam,
        chosen.use_lion_optimizer,
        chosen.optimizer_args,
        chosen.learning_rate,
        learning_rates_of_parts=kind.learning_rate_flags(options),
        learning_rate_given=chosen.learning_rate != OptimizerOptions.learning_rate,
    )
