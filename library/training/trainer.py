"""What every trainer shares: the story of a run, ``setup -> cache -> load -> fit -> finish``.

A trainer says what is trained and saved; the architecture says how its model works. Neither knows the
other's cases. ``train`` turns the namespace into frozen dataclasses on its first line; nothing deeper
sees ``args``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture, Conditioning, ModelInfo
from library.config.arguments import (
    DatasetOptions,
    OptimizerOptions,
    TrainNetworkOptions,
    build_parser,
    hide_secrets,
    with_groups,
)
from library.config.config_file import origins_of
from library.config.console import setup_console
from library.config.explain import print_explanation
from library.config.no_effect import report
from library.config.no_effect.by_dataset import without_effect_on_data
from library.config.no_effect.by_plan import without_effect_in_plan
from library.config.rules import check as check_rules
from library.data import describe
from library.data.conditioning import Role, check_roles
from library.data.dataset import Batch, TrainingData
from library.data.dataset_config import load_dataset_config
from library.data.unread_captions import unread_captions
from library.diffusion.objective import Objective
from library.errors import exits_on_user_error
from library.files.atomic import recover_directory
from library.files.hub import Uploads, check_target
from library.inference.prompt_line import SamplePrompt
from library.launched import is_first_process
from library.memory.attention import attention_backend
from library.optim.optimizers import resolve_optimizer
from library.optim.schedule_checks import check_scheduler
from library.optim.update import Metrics, Update
from library.training import precision
from library.training.caching import CacheJob, cache_latents, inspect_model
from library.training.checkpoints import OutputNames, ema_path
from library.training.debug_dataset import show_dataset
from library.training.dry_run import dry_run
from library.training.images import with_images
from library.interrupt import Interrupt
from library.training.loop import run_loop
from library.training.previews import encode_prompts, generate_preview
from library.training.processes import choose_seed, finalizing, make_accelerator, of_main_process, weight_dtype
from library.training.replay import replay
from library.training.resume import check_fits, read_state, resume_run, save_state, train_state
from library.training.run import Checked, Run
from library.training.run_hooks import RunHooks
from library.training.settings import (
    for_model,
    hub_target,
    learning_rates_of_parts,
    loss_settings,
    noise_settings,
    run_plan,
    sample_prompts,
    save_policy,
    schedule_settings,
    state_folder,
    tracker_settings,
)
from library.training.sharding import load_denoiser, shard_denoiser, sharding_for, sharding_rows
from library.training.step import NoiseSettings, batch_losses
from library.training.text_caching import (
    Tokenize,
    cache_texts,
    cached_encoders,
    caches_texts,
    text_cache_row,
    warn_of_cut,
)
from library.training.update_checks import check_update
from library.training.validation import Validation, check_validation
from library.training.zero import check_zero

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class Trainer(ABC):
    """Base of all trainers; an entry script sets ``architecture`` and calls ``train``."""

    #: the class's as the script declares it; an instance's also knows the run's options and model
    architecture: Architecture

    @property
    def conditioning_as(self) -> Role:
        """What the images of ``conditioning_data_dir`` are to this trainer."""
        return "image" if self.architecture.takes_images else "mask"

    # ---- the command line ----

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """The script's full parser; wrappers import it as ``setup_parser``."""
        groups = list(cls.joined_options().groups().values())
        return build_parser(groups, description=cls.__doc__, epilog=cls.usage())

    @classmethod
    def options_class(cls) -> type[TrainNetworkOptions]:
        return TrainNetworkOptions

    @classmethod
    def joined_options(cls) -> type[TrainNetworkOptions]:
        """``options_class`` with the groups that only the family has."""
        return with_groups(cls.options_class(), cls.architecture.option_groups)

    @classmethod
    def usage(cls) -> str | None:
        """An example command, shown at the end of ``--help``."""
        return None

    # ---- the story ----

    @exits_on_user_error
    def train(self, args: argparse.Namespace) -> None:
        """Run the whole training.

        Raises:
            SystemExit: code 2 after a user's error; 130 or 143 after Ctrl-C or SIGTERM, when all is saved.
        """
        options = self.joined_options().from_args(args)
        self.architecture = self.architecture.configured(options)
        hide_secrets(options, sys.argv)
        if options.config.replay:
            return replay(self, options)
        if options.config.explain:
            return print_explanation(options, origins_of(args), self.architecture)
        if options.dataset.debug_dataset:
            return show_dataset(options, self.architecture, self.conditioning_as)
        with Interrupt() as interrupt:
            run = self.setup(options)
            with finalizing(run.accelerator):
                if options.config.dry_run:
                    return dry_run(self, run)
                with contextlib.closing(run.uploads):
                    self.cache(run, interrupt)
                    self.load(run)
                    self.fit(run, interrupt)
                    self.finish(run, interrupt)

    def setup(self, options: TrainNetworkOptions) -> Run:
        """Check everything, scan the data, and lay out the run; no weights are loaded yet."""
        setup_console(options.console)
        self.architecture = self.architecture.configured(options)  # again: those of a recorded step are others
        checked = self.check(options)
        accelerator = make_accelerator(
            options.training, backends=checked.trackers.backends, directory=checked.trackers.directory
        )
        report(precision.check_device(options.training, accelerator.device), strict=options.config.strict)
        report(
            check_update(options, checked.optimizer, checked.resumed, accelerator.device), strict=options.config.strict
        )
        report(check_zero(options, checked.optimizer, accelerator), strict=options.config.strict)
        checked = replace(checked, seed=of_main_process(checked.seed))
        data = TrainingData(
            checked.dataset_config,
            seed=checked.seed,
            latent=self.architecture.latent,
            prior_loss_weight=options.loss.prior_loss_weight,
            conditioning_as=self.conditioning_as,
        )
        plan, start_step = run_plan(
            options,
            batches_per_epoch=data.batches_per_process(accelerator.num_processes),
            resumed=checked.resumed,
        )
        report(without_effect_in_plan(options, plan), strict=options.config.strict)
        return Run(
            checked=checked,
            accelerator=accelerator,
            data=data,
            plan=plan,
            names=OutputNames(
                Path(options.output.output_dir), options.output.output_name, options.output.save_model_as
            ),
            policy=save_policy(options, plan),
            objective=self.objective(options, checked.info),
            weight_dtype=weight_dtype(options.training),
            started_at=time.time(),
            start_step=start_step,
            uploads=Uploads(checked.hub if accelerator.is_main_process else None),
            sharding=sharding_for(accelerator, strict=options.config.strict),
        )

    def check(self, options: TrainNetworkOptions) -> Checked:
        """Refuse what cannot work, cheapest checks first.

        Raises:
            UserError: one line for each finding.
        """
        strict = options.config.strict
        if options.resume.resume:
            recover_directory(options.resume.resume)
        report(check_rules(options, self.architecture), strict=strict)
        dataset_config = load_dataset_config(options.dataset.dataset_config, options.dataset, options.validation)
        report((*without_effect_on_data(options, dataset_config), *unread_captions(dataset_config)), strict=strict)
        check_roles(dataset_config, self.conditioning_as, masked_loss=options.loss.masked_loss)
        optimizer = resolve_optimizer(
            options.optimizer.optimizer_type,
            options.optimizer.use_8bit_adam,
            options.optimizer.use_lion_optimizer,
            options.optimizer.optimizer_args,
            options.optimizer.learning_rate,
            learning_rates_of_parts=learning_rates_of_parts(options),
            learning_rate_given=options.optimizer.learning_rate != OptimizerOptions.learning_rate,
        )
        schedule = schedule_settings(options)
        report((*optimizer.warnings, *check_scheduler(optimizer, schedule)), strict=strict)
        self.check_trained(options)
        prompts = sample_prompts(options, self.architecture)
        folder = state_folder(options)
        resumed = read_state(folder) if folder else None
        if resumed is not None:
            check_fits(resumed, options, optimizer)
        check_validation(dataset_config, options.validation, resumed)
        trackers = tracker_settings(options)
        report(trackers.check(), strict=strict)
        checkpoint = inspect_model(self.architecture, options.model)
        self.architecture = self.architecture.for_model(checkpoint)
        self.architecture.check_options(options, checkpoint.info)
        prompts = for_model(prompts, self.architecture)
        objective = self.objective(options, checkpoint.info)
        objective.check(noise_settings(options).timesteps)
        for prompt in prompts:
            objective.sampler(prompt.sample_sampler, options.sample.sample_sampler)
        hub = hub_target(options)
        if hub is not None and is_first_process():
            hub = check_target(hub, create=not options.config.dry_run)
        return Checked(
            options=options,
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

    def cache(self, run: Run, interrupt: Interrupt) -> None:
        """Make or read the caches; afterwards the VAE is only kept where it is still needed."""
        self.check_before_caching(run)
        job = CacheJob(
            architecture=self.architecture,
            checkpoint=run.checked.checkpoint,
            data=run.data,
            options=run.options,
            accelerator=run.accelerator,
            weight_dtype=run.weight_dtype,
            interrupt=interrupt,
        )
        if run.caches_latents:
            keep = bool(run.checked.prompts) or self.architecture.takes_images  # which fetch it back
            run.vae = cache_latents(job, keep_vae=keep)
        else:
            run.vae = job.load_vae()
        if caches_texts(run.options.dataset):
            encode = partial(encode_prompts, self.architecture, run) if run.checked.prompts else None
            in_part = not all(cached_encoders(self.architecture, run.options))
            run.prompts = cache_texts(job, encode, in_part=in_part) or {}

    def load(self, run: Run) -> None:
        """Load tokenizers, encoders and denoiser, build what is trained, and resume."""
        training = run.options.training
        checkpoint = run.checked.checkpoint
        run.tokenizers = self.architecture.load_tokenizers(checkpoint)
        if run.accelerator.is_main_process and not caches_texts(run.options.dataset):
            warn_of_cut(run.data, self.architecture, run.tokenizers, run.options.model)
        cached = cached_encoders(self.architecture, run.options)
        home = precision.home_of_text_encoders(run)
        run.text_encoders = self.architecture.load_uncached_text_encoders(
            checkpoint, cached, dtype=run.weight_dtype, device=home
        )
        run.denoiser = load_denoiser(run, self.architecture)
        self.architecture.set_attention(run.denoiser, attention_backend(training))
        if training.gradient_checkpointing:
            self.architecture.enable_gradient_checkpointing(run.denoiser, run.text_encoders)
        run.objective = run.objective.to(run.device)
        run.update = self.build_update(run)
        run.parameters = run.update.parameters
        shard_denoiser(run, self.architecture)
        if training.torch_compile:
            precision.compile_denoiser(run, self.architecture.compiled_blocks)
        if run.data.validation_datasets:
            run.validation = Validation(self, run)
        if run.checked.resumed is not None:
            resume_run(run)

    def fit(self, run: Run, interrupt: Interrupt) -> None:
        """Train, save and draw until the last step or the first interrupt."""
        run_hooks = RunHooks(self, run)
        try:
            run_hooks.start()
            run.done_steps = run_loop(
                run.plan,
                start_step=run.start_step,
                seed=run.checked.seed,
                accelerator=run.accelerator,
                update=run.update,
                hooks=run_hooks,
                interrupt=interrupt,
                on_nan=run.options.training.on_nan,
            )
        finally:
            run_hooks.close()
        if run.done_steps < run.plan.total_steps and not run_hooks.is_over():
            raise SystemExit(interrupt.exit_code)

    def finish(self, run: Run, interrupt: Interrupt) -> None:
        """Save the final weights and, if asked for, the final state."""
        steps, epochs = run.done_steps, run.plan.epochs_begun(run.done_steps)
        self.save(run, run.names.final(), step=steps, epoch=epochs)
        if run.policy.save_state or run.policy.save_state_on_train_end:
            self.save_state(run, run.names.final_state(), step=steps, epoch=epochs, losses=[])
        if run.accelerator.is_main_process:
            logger.info("finished: %d steps, model saved as %s", steps, run.names.final())

    # ---- what a trainer adds ----

    @abstractmethod
    def check_trained(self, options: TrainNetworkOptions) -> None:
        """Refuse options of what is trained that cannot work. Raises UserError."""

    def check_before_caching(self, run: Run) -> None:
        """Refuse what can be found out of the models without their weights, before hours go into caches.

        Raises:
            UserError: what is trained cannot work beside a cache.
        """

    @abstractmethod
    def build_update(self, run: Run) -> Update:
        """Create the trained modules, and what updates them."""

    @abstractmethod
    def trained_on_meta(self, run: Run) -> list[tuple[str, list[nn.Parameter]]]:
        """What would be trained, by part, over models of a run that are on the meta device."""

    @abstractmethod
    def encode_text(self, run: Run, batch: Batch) -> Conditioning: ...

    @abstractmethod
    def trained_modules(self, run: Run) -> Sequence[nn.Module]:
        """Modules beside the model's own, whose dropout is off while drawing."""

    @abstractmethod
    def write_weights(self, run: Run, path: Path, *, step: int, epoch: int) -> None:
        """Write the trained weights atomically; called on the main process only."""

    @abstractmethod
    def training_mode(self, run: Run, training: bool) -> None:
        """Switch the trained modules (and schedule-free optimizers) between training and drawing or saving."""

    def epoch_started(self, run: Run, epoch: int) -> None:
        """A hook for trained modules that change by epoch."""

    def batch_started(self, run: Run, batch: Batch) -> None:
        """A hook before each forward pass of training."""

    def validation_batch_started(self, run: Run, batch: Batch) -> None:
        """A hook before each batch of a validation."""

    def step_ended(self, run: Run, step: int) -> Metrics:
        """A hook after each update; may return metrics to log."""
        return {}

    def trained_rows(self, run: Run) -> list[tuple[str, str]]:
        """Rows on what is trained, for the table before the first step."""
        return []

    # ---- shared pieces of the story ----

    def objective(self, options: TrainNetworkOptions, info: ModelInfo) -> Objective:
        return self.architecture.objective(
            v_prediction=info.v_prediction, zero_terminal_snr=options.noise.zero_terminal_snr
        )

    def summary(self, run: Run) -> list[tuple[str, str]]:
        """Rows of the table before the first step."""
        options, plan = run.options, run.plan
        accumulated = plan.gradient_accumulation_steps
        batches = f"{plan.batches_per_epoch} batches an epoch" + (
            f", {accumulated} to a step" if accumulated > 1 else ""
        )
        caches = "on disk" if options.dataset.cache_latents_to_disk else "in memory" if run.caches_latents else "no"
        return [
            ("model", f"{options.model.pretrained_model_name_or_path} ({run.checked.info.description})"),
            *describe.summary_rows(run.data),
            ("latents cached", caches),
            ("text encoder outputs cached", text_cache_row(options.dataset)),
            *self.trained_rows(run),
            ("optimizer", f"{run.checked.optimizer.metadata_name}, schedule {options.scheduler.lr_scheduler}"),
            ("precision", precision.precision_row(run)),
            *sharding_rows(run),
            ("steps", f"{plan.total_steps} in {plan.num_epochs} epochs, {batches}"),
            ("seed", str(run.checked.seed)),
            ("output", str(run.names.final())),
            ("logs", str(run.checked.trackers.directory)),
        ]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.weighted_losses(run, batch).mean()

    def weighted_losses(self, run: Run, batch: Batch) -> Tensor:
        """The loss of each sample (B,), times its weight."""
        with precision.activations(run.options.training), run.accelerator.autocast():
            latents, conditioning = self.latents(run, batch), self.encode_text(run, batch)
            losses = self.losses(run, batch, latents, conditioning, noise_settings(run.options))
            return losses * batch.loss_weights

    def losses(
        self,
        run: Run,
        batch: Batch,
        latents: Tensor,
        conditioning: Conditioning,
        noise: NoiseSettings,
        level: int | None = None,
    ) -> Tensor:
        """The loss of each sample (B,), at a drawn timestep each, or all at one level; called within autocast."""
        return batch_losses(
            self.architecture,
            run.denoiser,
            batch,
            latents,
            with_images(self.architecture, run, batch, conditioning),
            run.objective,
            noise,
            loss_settings(run.options),
            dtype=run.weight_dtype,
            level=level,
        )

    def batches(self, run: Run, epoch: int, start_batch: int) -> Iterable[Batch]:
        """The rest of an epoch, counted from 0, tokenised in the loader's workers."""
        return run.data.dataloader(
            epoch=epoch,
            start_batch=start_batch,
            rank=run.accelerator.process_index,
            world_size=run.accelerator.num_processes,
            plan=run.plan,
            **self.loading(run),
        )

    def loading(self, run: Run) -> dict[str, Any]:
        """How batches are prepared, those of training and those of validation."""
        model, dataset = run.options.model, run.options.dataset
        return {
            "tokenize": Tokenize(self.architecture, run.tokenizers, model.max_token_length, model.weighted_captions),
            "num_workers": _loader_processes(dataset.max_data_loader_n_workers),
            "pin_memory": run.device.type == "cuda",
            "persistent": dataset.persistent_data_loader_workers,
        }

    def draw(self, run: Run, prompt: SamplePrompt, path: Path | None) -> Image:
        """Draw one sample image with the weights as they are, and save it with its settings if there is a path."""
        return generate_preview(self, run, prompt, path)

    def latents(self, run: Run, batch: Batch) -> Tensor:
        """(B, C, h, w) stored-form latents: cached ones, or encoded now with draws keyed by the visit."""
        if batch.latents is not None:
            return batch.latents
        from library.randomness import torch_generator

        generators = [torch_generator(visit, "latents") for visit in batch.visits]
        with torch.no_grad():
            return self.architecture.encode_images(run.vae, batch.images, generators).float()

    def save(self, run: Run, path: Path, *, step: int, epoch: int) -> None:
        self.training_mode(run, False)
        if run.accelerator.is_main_process:
            self.write_weights(run, path, step=step, epoch=epoch)
            logger.info("saved weights: %s", path)
            for written in (path, ema_path(path)) if run.options.optimizer.ema_decay is not None else (path,):
                run.uploads.add(written)
        self.training_mode(run, True)

    def save_state(self, run: Run, path: Path, *, step: int, epoch: int, losses: list[float]) -> None:
        # in training mode: schedule-free optimizers then go on from the very weights that they trained
        save_state(run.accelerator, path, train_state(run, step=step, epoch=epoch, losses=losses))
        if run.options.output.save_state_to_huggingface:
            run.uploads.add(path)


def _loader_processes(given: int) -> int:
    """How many processes prepare batches: no more than threads of the processor, of which the default leaves one."""
    threads = os.cpu_count() or 1
    return min(given, max(1, threads - 1) if given == DatasetOptions.max_data_loader_n_workers else threads)
