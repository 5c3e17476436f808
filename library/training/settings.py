"""From the options of a run to the settings that its pieces take."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.arguments import TrainNetworkOptions
from library.config.config_file import load_toml
from library.optim.schedulers import ScheduleSettings
from library.training.checkpoints import SavePolicy
from library.training.logs import TrackerSettings
from library.training.plan import RunPlan
from library.training.step import LossSettings, NoiseSettings

if TYPE_CHECKING:
    from library.training.resume import TrainState


MAX_RANDOM_SEED = 2**31 - 1


def run_seed(options: TrainNetworkOptions, resumed: TrainState | None = None) -> int:
    """``--seed``; without it, the one that the first part of a resumed run drew; else a new one."""
    if options.training.seed is not None:
        return options.training.seed
    if resumed is not None and resumed.seed is not None:
        return resumed.seed
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED)


def save_policy(options: TrainNetworkOptions, plan: RunPlan) -> SavePolicy:
    output = options.output
    every_n_epochs = output.save_every_n_epochs
    if output.save_n_epoch_ratio is not None:
        every_n_epochs = SavePolicy.every_from_ratio(plan.num_epochs, output.save_n_epoch_ratio)
    return SavePolicy(
        every_n_epochs=every_n_epochs,
        every_n_steps=output.save_every_n_steps,
        last_n_epochs=output.save_last_n_epochs,
        last_n_steps=output.save_last_n_steps,
        last_n_epochs_state=output.save_last_n_epochs_state,
        last_n_steps_state=output.save_last_n_steps_state,
        save_state=output.save_state,
        save_state_on_train_end=output.save_state_on_train_end,
    )


def tracker_settings(options: TrainNetworkOptions) -> TrackerSettings:
    wanted = options.logging
    config: Mapping[str, Any] = load_toml(Path(wanted.log_tracker_config)) if wanted.log_tracker_config else {}
    return TrackerSettings.make(
        logging_dir=wanted.logging_dir,
        output_dir=Path(options.output.output_dir),
        log_prefix=wanted.log_prefix,
        log_with=wanted.log_with,
        tracker_name=wanted.log_tracker_name,
        wandb_run_name=wanted.wandb_run_name,
        wandb_api_key=wanted.wandb_api_key,
        tracker_config=config,
    )


def schedule_settings(options: TrainNetworkOptions) -> ScheduleSettings:
    s = options.scheduler
    return ScheduleSettings(
        name=s.lr_scheduler,
        type=s.lr_scheduler_type,
        args=s.lr_scheduler_args,
        warmup=s.lr_warmup_steps,
        decay=s.lr_decay_steps,
        num_cycles=s.lr_scheduler_num_cycles,
        power=s.lr_scheduler_power,
        timescale=s.lr_scheduler_timescale,
        min_lr_ratio=s.lr_scheduler_min_lr_ratio,
    )


def noise_settings(options: TrainNetworkOptions) -> NoiseSettings:
    noise = options.noise
    return NoiseSettings(
        offset=noise.noise_offset,
        offset_random_strength=noise.noise_offset_random_strength,
        adaptive_scale=noise.adaptive_noise_scale,
        multires_iterations=noise.multires_noise_iterations,
        multires_discount=noise.multires_noise_discount,
        ip_gamma=noise.ip_noise_gamma,
        ip_gamma_random_strength=noise.ip_noise_gamma_random_strength,
        min_timestep=noise.min_timestep if noise.min_timestep is not None else 0,
        max_timestep=noise.max_timestep if noise.max_timestep is not None else 1000,
    )


def loss_settings(options: TrainNetworkOptions) -> LossSettings:
    loss = options.loss
    return LossSettings(
        loss_type=loss.loss_type,
        huber_schedule=loss.huber_schedule,
        huber_c=loss.huber_c,
        huber_scale=loss.huber_scale,
        min_snr_gamma=loss.min_snr_gamma,
        scale_v_pred_like_noise_pred=loss.scale_v_pred_loss_like_noise_pred,
        v_pred_like_weight=loss.v_pred_like_loss,
        debiased=loss.debiased_estimation_loss,
    )
