"""Turn the options of a run into the settings of its components."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.architectures.base import Architecture
from library.config.arguments import RunOptions
from library.config.toml_file import load_toml
from library.data.image_io import read_size
from library.data.run_plan import Origin, RunPlan
from library.diffusion.objective import LossSettings
from library.errors import UserError, naming
from library.files.hub import HubTarget, RemoteFolder, download_folder
from library.inference.prompt_file import read_prompt_file
from library.inference.prompt_line import SamplePrompt, without_idle_settings
from library.optim.schedulers import ScheduleSettings
from library.optim.update import UpdateSettings
from library.optim.zero import Zero
from library.training.checkpoints import SavePolicy
from library.training.logs import TrackerSettings
from library.training.resume import TrainState
from library.training.step import NoiseSettings

logger = logging.getLogger(__name__)


def sample_prompts(
    options: RunOptions, architecture: Architecture, *, reads_images: bool = False
) -> tuple[SamplePrompt, ...]:
    """Read the prompts of a run that generates sample images.

    Args:
        reads_images: whether each prompt needs a conditioning image.

    Raises:
        UserError: the file cannot be read, holds none, or a prompt lacks its conditioning image.
    """
    wanted = options.sample
    if not wanted.sample_prompts or not wanted.is_asked_for:
        return ()
    step, own = architecture.sample_size_step, architecture.declaration.prompt_options
    used = architecture.sample_fields | ({"controlnet_image"} if reads_images else set())
    prompts = tuple(read_prompt_file(Path(wanted.sample_prompts), size_multiple=step, used=used, own=own))
    for prompt in prompts if reads_images else ():
        if not prompt.controlnet_image:
            raise UserError(
                f'{wanted.sample_prompts}: the prompt "{prompt.prompt}" has no conditioning image; add --cn image.png'
            )
        with naming(str(wanted.sample_prompts), "--cn"):
            read_size(Path(prompt.controlnet_image))
    return prompts


def for_model(prompts: tuple[SamplePrompt, ...], architecture: Architecture) -> tuple[SamplePrompt, ...]:
    """Return the prompts for the family's model, with warnings of settings without effect."""
    scale = architecture.sample_defaults["scale"]
    return without_idle_settings(prompts, architecture.idle_sample_fields, scale=scale)


def run_plan(options: RunOptions, *, batches_per_epoch: int, resumed: TrainState | None) -> tuple[RunPlan, int]:
    """Return the plan of a run, and how many steps are done at its start.

    Raises:
        UserError: it would start after its end.
    """
    training, start = options.training, options.resume

    def make(origin: Origin) -> RunPlan:
        return RunPlan.make(
            batches_per_epoch=batches_per_epoch,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            max_train_steps=training.max_train_steps,
            max_train_epochs=training.max_train_epochs,
            origin=origin,
        )

    if resumed is not None:
        plan = make(Origin(resumed.origin_step, resumed.origin_epoch))
        if resumed.current_step > plan.total_steps:
            raise UserError(
                f"--resume {start.resume}: the state is of step {resumed.current_step} and the run ends at step "
                f"{plan.total_steps}; raise --max_train_steps or --max_train_epochs"
            )
        if resumed.current_step == plan.total_steps:
            # such as one of a run that was killed before its last files were written
            logger.warning(
                "--resume %s: the state is of the last step, %d: only the final files are written; to train on, raise "
                "--max_train_steps or --max_train_epochs",
                *(start.resume, resumed.current_step),
            )
        return plan, resumed.current_step
    whole = make(Origin())
    first = whole.steps_until((start.initial_epoch or 1) - 1)
    if start.initial_step is not None:
        first = start.initial_step
    plan = whole if start.skip_until_initial_step else make(Origin(first, whole.position(first).epoch))
    if first >= plan.total_steps:
        name = "initial_step" if start.initial_step is not None else "initial_epoch"
        raise UserError(
            f"--{name} {getattr(start, name)}: the run would start after step {first}, and ends after step "
            f"{plan.total_steps}, counted from the very first; raise --max_train_steps or --max_train_epochs"
        )
    return plan, first


def hub_target(options: RunOptions) -> HubTarget | None:
    """Return the target of uploads, if any."""
    output = options.output
    if not output.huggingface_repo_id:
        return None
    visibility = output.huggingface_repo_visibility
    return HubTarget(
        repo_id=output.huggingface_repo_id,
        repo_type=output.huggingface_repo_type or "model",
        folder=(output.huggingface_path_in_repo or "").strip("/"),
        token=output.huggingface_token,
        visibility="private" if visibility and visibility != "public" else visibility,
        in_background=output.async_upload,
    )


def state_folder(options: RunOptions) -> Path | None:
    """Return the state to resume from, downloaded if it is on the Hub.

    Raises:
        UserError: it cannot be downloaded.
    """
    if not options.resume.resume:
        return None
    if not options.resume.resume_from_huggingface:
        return Path(options.resume.resume)
    return download_folder(RemoteFolder.parse(options.resume.resume), options.output.huggingface_token)


def save_policy(options: RunOptions, plan: RunPlan) -> SavePolicy:
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


def tracker_settings(options: RunOptions, *, default_name: str = "network_train") -> TrackerSettings:
    wanted = options.logging
    config: Mapping[str, Any] = load_toml(Path(wanted.log_tracker_config)) if wanted.log_tracker_config else {}
    return TrackerSettings.make(
        logging_dir=wanted.logging_dir,
        output_dir=options.output.folder,
        output_name=options.output.output_name,
        log_prefix=wanted.log_prefix,
        log_with=wanted.log_with,
        tracker_name=wanted.log_tracker_name or default_name,
        wandb_run_name=wanted.wandb_run_name,
        wandb_api_key=wanted.wandb_api_key,
        config_file=wanted.log_tracker_config,
        tracker_config=config,
    )


def schedule_settings(options: RunOptions) -> ScheduleSettings:
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


def update_settings(
    options: RunOptions, *, seed: int, total_steps: int, zero: Zero | None, keeps_copies: bool
) -> UpdateSettings:
    """Return the settings of ``Update``.

    Args:
        zero: what is sharded in this run, see ``library.training.zero``.
        keeps_copies: see ``Kind.keeps_copies``.
    """
    return UpdateSettings(
        seed=seed,
        total_steps=total_steps,
        max_grad_norm=options.optimizer.max_grad_norm,
        ema_decay=options.optimizer.ema_decay,
        zero=zero,
        keeps_copies=keeps_copies,
        gradients_as_views=options.training.ddp_gradient_as_bucket_view,
    )


def noise_settings(options: RunOptions) -> NoiseSettings:
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


def loss_settings(options: RunOptions) -> LossSettings:
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
