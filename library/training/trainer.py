"""What every trainer shares: the story of a run, ``setup -> cache -> fit -> finish``.

A trainer says what is trained and saved; the architecture says how its model works. Neither knows the
other's cases. ``train`` turns the namespace into frozen dataclasses on its first line; nothing deeper
sees ``args``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture, Conditioning, ModelInfo
from library.config.arguments import TrainNetworkOptions, build_parser
from library.config.console import setup_console
from library.config.rules import check as check_rules
from library.data import describe
from library.data.conditioning import Role, check_roles
from library.data.dataset import Batch, TrainingData
from library.data.dataset_config import DatasetConfig, load_dataset_config
from library.data.latent_cache import Encode
from library.diffusion.ddpm import NoiseSchedule
from library.diffusion.samplers import check_sampler
from library.errors import UserError, exits_on_user_error
from library.inference.prompt_line import SamplePrompt, read_prompt_file
from library.optim.optimizers import OptimizerChoice, resolve_optimizer
from library.optim.schedulers import ScheduleSettings, check_scheduler
from library.training.checkpoints import OutputNames, SavePolicy
from library.training.debug_dataset import show_dataset
from library.training.fitting import Fitting
from library.training.interrupt import Interrupt
from library.training.logs import TrackerSettings
from library.training.loop import Trained, run_loop
from library.training.plan import RunPlan
from library.training.resume import TrainState, load_state, read_state, save_state
from library.training.settings import (
    loss_settings,
    noise_settings,
    run_seed,
    save_policy,
    schedule_settings,
    tracker_settings,
)
from library.training.step import training_loss

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """All that could be found out and refused before anything heavy is loaded."""

    options: TrainNetworkOptions
    dataset_config: DatasetConfig
    checkpoint: Any  # the family's own, for its loaders
    info: ModelInfo
    optimizer: OptimizerChoice
    learning_rate_schedule: ScheduleSettings
    prompts: tuple[SamplePrompt, ...]
    resumed: TrainState | None
    trackers: TrackerSettings
    seed: int


@dataclass
class Run:
    """A run in progress."""

    checked: Checked
    accelerator: Accelerator
    data: TrainingData
    plan: RunPlan
    names: OutputNames
    policy: SavePolicy
    schedule: NoiseSchedule
    weight_dtype: torch.dtype
    started_at: float
    tokenizers: list[Any] = field(default_factory=list)
    text_encoders: list[nn.Module] = field(default_factory=list)
    denoiser: nn.Module | None = None
    vae: nn.Module | None = None
    trained: Trained | None = None
    record: Any = None  # metadata of what is saved
    start_step: int = 0

    @property
    def options(self) -> TrainNetworkOptions:
        return self.checked.options

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def caches_latents(self) -> bool:
        return self.options.dataset.cache_latents or self.options.dataset.cache_latents_to_disk


class Trainer(ABC):
    """Base of all trainers; an entry script sets ``architecture`` and calls ``train``."""

    architecture: ClassVar[Architecture]
    #: what the pictures of ``conditioning_data_dir`` are to this trainer
    conditioning_as: ClassVar[Role] = "mask"

    # ---- the command line ----

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """The script's full parser; wrappers import it as ``setup_parser``."""
        groups = list(cls.options_class().groups().values())
        return build_parser(groups, description=cls.__doc__, epilog=cls.usage())

    @classmethod
    def options_class(cls) -> type[TrainNetworkOptions]:
        return TrainNetworkOptions

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
        options = self.options_class().from_args(args)
        if options.dataset.debug_dataset:
            show_dataset(options, self.architecture, self.conditioning_as)
            return
        with Interrupt() as interrupt:
            run = self.setup(options)
            self.cache(run)
            self.load(run)
            self.fit(run, interrupt)
            self.finish(run, interrupt)

    def setup(self, options: TrainNetworkOptions) -> Run:
        """Check everything, scan the data, and lay out the run; no weights are loaded yet."""
        setup_console(options.console)
        checked = self.check(options)
        data = TrainingData(
            checked.dataset_config,
            seed=checked.seed,
            latent=self.architecture.latent,
            prior_loss_weight=options.loss.prior_loss_weight,
            conditioning_as=self.conditioning_as,
        )
        accelerator = _make_accelerator(checked)
        plan = RunPlan.make(
            batches_per_epoch=data.batches_per_process(accelerator.num_processes),
            gradient_accumulation_steps=options.training.gradient_accumulation_steps,
            max_train_steps=options.training.max_train_steps,
            max_train_epochs=options.training.max_train_epochs,
        )
        weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
            options.training.mixed_precision, torch.float32
        )
        return Run(
            checked=checked,
            accelerator=accelerator,
            data=data,
            plan=plan,
            names=OutputNames(
                Path(options.output.output_dir), options.output.output_name, options.output.save_model_as
            ),
            policy=save_policy(options, plan),
            schedule=self.architecture.noise_schedule(zero_terminal_snr=options.noise.zero_terminal_snr),
            weight_dtype=weight_dtype,
            started_at=time.time(),
        )

    def check(self, options: TrainNetworkOptions) -> Checked:
        """Refuse what cannot work, cheapest checks first.

        Raises:
            UserError: one line for each finding.
        """
        for warning in check_rules(options, self.architecture):
            logger.warning(warning)
        dataset_config = load_dataset_config(options.dataset.dataset_config, options.dataset)
        check_roles(dataset_config, self.conditioning_as, masked_loss=options.loss.masked_loss)
        optimizer = resolve_optimizer(
            options.optimizer.optimizer_type,
            options.optimizer.use_8bit_adam,
            options.optimizer.use_lion_optimizer,
            options.optimizer.optimizer_args,
            options.optimizer.learning_rate,
            separate_rates=options.optimizer.unet_lr is not None or bool(options.optimizer.text_encoder_lr),
        )
        schedule = schedule_settings(options)
        for warning in (*optimizer.warnings, *check_scheduler(optimizer, schedule)):
            logger.warning(warning)
        self.check_trained(options)
        prompts = self._read_prompts(options)
        resumed = read_state(Path(options.resume.resume)) if options.resume.resume else None
        trackers = tracker_settings(options)
        trackers.check()
        model = options.model
        checkpoint = self.architecture.inspect(
            model.pretrained_model_name_or_path,
            v2=model.v2,
            v_parameterization=model.v_parameterization,
            vae=model.vae,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
        )
        self.architecture.check_options(options, checkpoint.info)
        for prompt in prompts:
            check_sampler(
                prompt.sample_sampler or options.sample.sample_sampler,
                v_prediction=checkpoint.info.v_prediction,
                zero_terminal_snr=_draws_with_zero_snr(options, checkpoint.info),
            )
        return Checked(
            options=options,
            dataset_config=dataset_config,
            checkpoint=checkpoint,
            info=checkpoint.info,
            optimizer=optimizer,
            learning_rate_schedule=schedule,
            prompts=prompts,
            resumed=resumed,
            trackers=trackers,
            seed=run_seed(options, resumed),
        )

    def cache(self, run: Run) -> None:
        """Make or read the latent cache; afterwards the VAE is only kept where it is still needed."""
        options = run.options.dataset
        draws = bool(run.checked.prompts)
        if not run.caches_latents:
            run.vae = self._load_vae(run)
            return
        # one process encodes to disk, the others find its files; in memory each needs its own
        with run.accelerator.main_process_first() if options.cache_latents_to_disk else contextlib.nullcontext():
            made = run.data.cache_latents(
                lambda: self._encoder(run),
                batch_size=options.vae_batch_size,
                to_disk=options.cache_latents_to_disk,
                vae_identity=self.architecture.vae_identity(run.checked.checkpoint),
                trust=options.skip_cache_check,
                report=_CacheReport(),
            )
        logger.info("latents: %d encoded, %d from the cache", made, run.data.picture_count() - made)
        if draws and run.vae is None:
            run.vae = self._load_vae(run)
        if run.vae is not None:
            run.vae = run.vae.to("cpu") if draws else None  # previews fetch it back
        if run.device.type == "cuda" and not run.options.training.highvram:
            torch.cuda.empty_cache()

    def load(self, run: Run) -> None:
        """Load tokenizers, encoders and denoiser, build what is trained, and resume."""
        training = run.options.training
        checkpoint = run.checked.checkpoint
        device = str(run.device)
        run.tokenizers = self.architecture.load_tokenizers(checkpoint)
        run.text_encoders = self.architecture.load_text_encoders(checkpoint, dtype=run.weight_dtype, device=device)
        denoiser = self.architecture.load_denoiser(checkpoint, dtype=run.weight_dtype, device=device)
        # convolutions are faster so; benchmarks/RESULTS.md has the figure. Linear layers stay as they are
        run.denoiser = denoiser.to(memory_format=torch.channels_last)
        self.architecture.set_attention(
            run.denoiser, "xformers" if training.xformers else "torch" if training.sdpa else "math"
        )
        if training.gradient_checkpointing:
            self.architecture.enable_gradient_checkpointing(run.denoiser, run.text_encoders)
        run.schedule = run.schedule.to(run.device)
        run.trained = self.build_trained(run)
        if run.options.resume.resume:
            self._resume(run)

    def fit(self, run: Run, interrupt: Interrupt) -> None:
        """Train, save and draw until the last step or the first interrupt."""
        fitting = Fitting(self, run)
        try:
            fitting.start()
            done = run_loop(
                run.plan,
                start_step=run.start_step,
                seed=run.checked.seed,
                accelerator=run.accelerator,
                trained=run.trained,
                hooks=fitting,
                interrupt=interrupt,
            )
        finally:
            fitting.close()
        if done < run.plan.total_steps:
            raise SystemExit(interrupt.exit_code)

    def finish(self, run: Run, interrupt: Interrupt) -> None:
        """Save the final weights and, if asked for, the final state."""
        steps, epochs = run.plan.total_steps, run.plan.num_epochs
        self.save(run, run.names.final(), step=steps, epoch=epochs)
        if run.policy.save_state or run.policy.save_state_on_train_end:
            self.save_state(run, run.names.final_state(), step=steps, epoch=epochs, losses=[])
        if run.accelerator.is_main_process:
            logger.info("finished: %d steps, model saved as %s", steps, run.names.final())

    # ---- what a trainer adds ----

    @abstractmethod
    def check_trained(self, options: TrainNetworkOptions) -> None:
        """Refuse options of what is trained that cannot work. Raises UserError."""

    @abstractmethod
    def build_trained(self, run: Run) -> Trained:
        """Create the trained modules with optimizer and scheduler, prepared by the accelerator."""

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
        """A hook before each forward pass."""

    def step_ended(self, run: Run, step: int) -> dict[str, Tensor]:
        """A hook after each update; may return figures to log."""
        return {}

    def learning_rates(self, run: Run) -> dict[str, float]:
        """The trackers' ``lr/...`` entries."""
        return {}

    def trained_rows(self, run: Run) -> list[tuple[str, str]]:
        """Rows on what is trained, for the table before the first step."""
        return []

    # ---- shared pieces of the story ----

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
            *self.trained_rows(run),
            ("optimizer", f"{run.checked.optimizer.metadata_name}, schedule {options.scheduler.lr_scheduler}"),
            (
                "precision",
                f"{options.training.mixed_precision}, frozen weights {str(run.weight_dtype)[6:]}, {run.device}",
            ),
            ("steps", f"{plan.total_steps} in {plan.num_epochs} epochs, {batches}"),
            ("seed", str(run.checked.seed)),
            ("output", str(run.names.final())),
            ("logs", str(run.checked.trackers.directory)),
        ]

    def loss(self, run: Run, batch: Batch) -> Tensor:
        with run.accelerator.autocast():
            return training_loss(
                self.architecture,
                run.denoiser,
                batch,
                self._latents(run, batch),
                lambda b: self.encode_text(run, b),
                run.schedule,
                noise_settings(run.options),
                loss_settings(run.options),
                v_prediction=run.checked.info.v_prediction,
                dtype=run.weight_dtype,
            )

    def batches(self, run: Run, epoch: int, start_batch: int) -> Iterable[Batch]:
        """The rest of an epoch, counted from 0, tokenised in the loader's workers."""
        model, dataset = run.options.model, run.options.dataset
        return run.data.dataloader(
            epoch=epoch,
            start_batch=start_batch,
            tokenize=Tokenize(self.architecture, run.tokenizers, model.max_token_length, model.weighted_captions),
            num_workers=min(dataset.max_data_loader_n_workers, os.cpu_count() or 1),
            pin_memory=run.device.type == "cuda",
            persistent=dataset.persistent_data_loader_workers,
            rank=run.accelerator.process_index,
            world_size=run.accelerator.num_processes,
            plan=run.plan,
        )

    def draw(self, run: Run, prompt: SamplePrompt, path: Path) -> Image:
        """Draw one sample image with the weights as they are, and save it with its settings."""
        from library.inference.generate import DrawOptions, ImageModels, generate_image, settings_for
        from library.inference.png import save_png

        model = run.options.model
        settings = settings_for(prompt, self.architecture.sample_defaults, sampler=run.options.sample.sample_sampler)
        models = ImageModels(
            architecture=self.architecture,
            tokenizers=run.tokenizers,
            text_encoders=run.text_encoders,
            denoiser=run.denoiser,
            vae=run.vae,
            v_prediction=run.checked.info.v_prediction,
            adapters=self.trained_modules(run),
        )
        drawing = DrawOptions(
            device=run.device,
            dtype=run.weight_dtype,
            zero_terminal_snr=_draws_with_zero_snr(run.options, run.checked.info),
            clip_skip=model.clip_skip,
            max_token_length=model.max_token_length,
        )
        image = generate_image(models, settings, drawing)
        name = Path(model.pretrained_model_name_or_path).name
        save_png(image, path, settings.record(model=name, network=run.options.output.output_name or ""))
        return image

    def _latents(self, run: Run, batch: Batch) -> Tensor:
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
        self.training_mode(run, True)

    def save_state(self, run: Run, path: Path, *, step: int, epoch: int, losses: list[float]) -> None:
        self.training_mode(run, False)
        state = TrainState(epoch, step, run.checked.seed, _fingerprint(run), losses)
        save_state(run.accelerator, path, state)
        self.training_mode(run, True)

    def _resume(self, run: Run) -> None:
        state = run.checked.resumed
        for change in state.changes(_fingerprint(run)):
            logger.warning("--resume: %s: the run goes on, but not exactly as it would have", change)
        load_state(run.accelerator, Path(run.options.resume.resume))
        run.start_step = state.current_step
        if run.start_step >= run.plan.total_steps:
            raise UserError(
                f"--resume {run.options.resume.resume}: the state stands at step {run.start_step} and the run ends at "
                f"step {run.plan.total_steps}; raise --max_train_steps or --max_train_epochs"
            )
        logger.info("resumed at step %d of %d", run.start_step, run.plan.total_steps)

    def _load_vae(self, run: Run) -> nn.Module:
        dtype = torch.float32 if run.options.model.no_half_vae else run.weight_dtype
        return self.architecture.load_vae(run.checked.checkpoint, dtype=dtype, device=str(run.device))

    def _encoder(self, run: Run) -> Encode:
        """Load the VAE and return pixels (B, 3, H, W) -> latents (B, C, h, w) on the host."""
        run.vae = self._load_vae(run)

        def encode(pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            with torch.no_grad():
                return self.architecture.encode_images(run.vae, pixels.to(run.device), generators).float().cpu()

        return encode

    def _read_prompts(self, options: TrainNetworkOptions) -> tuple[SamplePrompt, ...]:
        wanted = options.sample
        if not wanted.sample_prompts or not (
            wanted.sample_every_n_steps or wanted.sample_every_n_epochs or wanted.sample_at_first
        ):
            return ()
        return tuple(read_prompt_file(Path(wanted.sample_prompts)))


@dataclass(frozen=True)
class Tokenize:
    """Captions to token tensors; a picklable callable for the loader's workers."""

    architecture: Architecture
    tokenizers: Sequence[Any]
    max_token_length: int | None
    weighted: bool

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return self.architecture.tokenize(
            self.tokenizers, captions, max_token_length=self.max_token_length, weighted=self.weighted
        )


def _make_accelerator(checked: Checked) -> Accelerator:
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    training = checked.options.training
    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    handlers: list[Any] = []
    if training.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=training.ddp_timeout)))
    return Accelerator(
        mixed_precision=training.mixed_precision,
        log_with=list(checked.trackers.backends),
        project_dir=str(checked.trackers.directory),
        kwargs_handlers=handlers,
        # one scheduler step per optimizer step, however many processes there are
        step_scheduler_with_optimizer=False,
    )


def _draws_with_zero_snr(options: TrainNetworkOptions, info: ModelInfo) -> bool:
    """Samplers cannot start from pure noise with a model that predicts it; training with it only warns."""
    return options.noise.zero_terminal_snr and info.v_prediction


class _CacheReport:
    """Says now and then how far the encoding is."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= 10 or (done == total and now - self._started >= 10):
            self._said = now
            logger.info("encoding pictures: %d of %d, %.1f a second", done, total, done / (now - self._started))


def _fingerprint(run: Run) -> dict[str, object]:
    """What a resumed run must share to go on exactly; JSON values only."""
    options = run.options
    return {
        "seed": run.checked.seed,
        "batches per epoch": run.plan.batches_per_epoch,
        "--gradient_accumulation_steps": options.training.gradient_accumulation_steps,
        "total steps": run.plan.total_steps,
        "processes": run.accelerator.num_processes,
        "--mixed_precision": options.training.mixed_precision,
        "optimizer": run.checked.optimizer.metadata_name,
        "--lr_scheduler": options.scheduler.lr_scheduler,
        "--learning_rate": options.optimizer.learning_rate,
        "--network_module": options.network.network_module,
    }
