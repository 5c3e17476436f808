"""Train a latent upscaler: a network that refines the latents of images enlarged by Lanczos.

It learns from crops. A crop is made small, enlarged by Lanczos as images are where the network is used, and encoded;
the network should give the latents of the crop itself. There are no captions, timesteps or denoiser, which is why this
is a loop of its own and no kind of the trainer; the pieces around it are the trainer's.

Shape legend: B crops, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.common.checkpoint import vae_at, vae_identity
from library.architectures.common.kl_vae import build_vae
from library.architectures.common.loading import load_frozen
from library.config.devices import parse_device
from library.diffusion.loss import conditional_loss
from library.errors import UserError
from library.files.finite import not_finite, some_of
from library.files.lock import Held, lock_path, locked
from library.files.safetensors_io import save_tensors
from library.inference.failures import naming_memory
from library.inference.latent_upscaler import VAE_KEY, LatentUpscaler, check_channels, load_latent_upscaler
from library.interrupt import Interrupt
from library.memory.placing import move
from library.optim.optimizers import OptimizerChoice, resolve_optimizer
from library.optim.schedule_checks import check_scheduler
from library.optim.schedulers import ScheduleSettings, create_scheduler
from library.optim.states import keep_state_dtypes
from library.optim.trial import check_by_trial
from library.optim.two_weights import use_weights
from library.randomness import torch_generator
from library.training.logs import Progress, print_summary
from library.training.metrics import DeferredMetrics, LossAverage
from library.training.upscaler.crops import (
    Crops,
    CropSettings,
    Latents,
    Pixels,
    digest,
    encode,
    find_images,
    split,
)
from library.training.upscaler.options import UpscalerOptions, small_side, state_file
from library.training.upscaler.state import read_state, write_state

logger = logging.getLogger(__name__)

#: schedules whose learning rates do not depend on the length of the run
_ENDLESS = ("constant", "constant_with_warmup")
#: steps in the average of the shown loss
_WINDOW = 50


@dataclass(frozen=True)
class Errors:
    """Root mean squares of the difference from the wanted latents, in units of the denoiser's latents."""

    lanczos: float  # without the network
    refined: float

    @property
    def share(self) -> float:
        return self.refined / self.lanczos if self.lanczos else math.inf


def train_upscaler(options: UpscalerOptions, *, simple: bool = False) -> int:
    """Train as the options say.

    Args:
        simple: plain lines instead of a progress bar on a terminal too.

    Returns:
        the exit code: 0, or after Ctrl-C that of the signal.

    Raises:
        UserError: files that cannot be used, or a loss that is not finite.
    """
    target = Path(options.files.output_file or "")
    try:
        with locked(lock_path(target.absolute().parent, target.name)), naming_memory("try a smaller --batch_size"):
            return _Run(options, target, simple=simple).run()
    except Held as error:
        raise UserError(f"--output_file {target}: {error.owner} is training it") from None


class _Run:
    """One run, from its files to the last step."""

    def __init__(self, options: UpscalerOptions, target: Path, *, simple: bool) -> None:
        self._options, self._target, self._simple = options, target, simple
        given, files = options.training, options.files
        choice, schedule = _checked_update(options)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if given.device:
            self._device = parse_device("--device", given.device)
        for warning in check_by_trial(choice, self._device, keeps_states=True):
            logger.warning("%s", warning)
        folder = Path(files.train_data_dir or "")
        images = find_images(folder, recursive=files.recursive, side=given.resolution)
        learned, kept = split(images, options.watching.validation_split, given.seed)
        source = vae_at(files.vae_path or "", flag="--vae_path")
        check_channels(source.config, f"--vae_path {files.vae_path}")
        self._vae_identity = vae_identity(source)
        self._settings = _recorded(options, choice, digest(images, folder), self._vae_identity)
        state = read_state(state_file(target), self._settings) if files.resume else None
        if files.weights:
            self._network = load_latent_upscaler(Path(files.weights), "--weights")
        else:
            self._network = _new_network(given.width, given.seed)
        self._vae = load_frozen(
            source, partial(build_vae, source.config), dtype=torch.float32, device=str(self._device)
        )
        self._factor = float(self._vae.config.scaling_factor)
        move(self._network, self._device)
        self._optimizer = choice.create([{"params": list(self._network.parameters())}])
        keep_state_dtypes(self._optimizer, self._device)
        self._schedule = create_scheduler(self._optimizer, choice, schedule, total_steps=given.max_train_steps)
        self._step = self._first = 0
        if state is not None:
            self._restore(state)
        crops = CropSettings(given.resolution, small_side(options), given.flip_aug, given.seed)
        self._crops = Crops(learned, crops, "upscaler")
        self._kept = Crops(kept, crops, "upscaler validation") if kept else None
        self._pending = DeferredMetrics()
        self._average = LossAverage(_WINDOW)
        self._found: Errors | None = None
        self._counts = (len(learned), len(kept))

    def run(self) -> int:
        """Train to the last step; returns the exit code."""
        total = self._options.training.max_train_steps
        if self._step >= total:
            raise UserError(f"--max_train_steps {total}: the state is of step {self._step} already; give more")
        kept = self._encode_kept()
        self._say_what_begins(kept)
        progress = Progress(total=total, done=self._step, simple=self._simple, enabled=True)
        try:
            with Interrupt() as interrupt, ThreadPoolExecutor(max_workers=1) as reader:
                self._fit(kept, progress, interrupt, reader)
                with interrupt.finishing():
                    self._finish(kept)
        finally:
            progress.close()
        return interrupt.exit_code if interrupt.requested else 0

    def _fit(self, kept: Latents | None, progress: Progress, interrupt: Interrupt, reader: ThreadPoolExecutor) -> None:
        """Take steps until the last one or a signal; the next crops are read beside each."""
        own, watching = self._options.training, self._options.watching
        total, images = own.max_train_steps, self._counts[0]
        following = reader.submit(self._read, self._step + 1)
        while self._step < total and not interrupt.requested:
            try:
                pixels = following.result()
            except UserError:  # an image that became unreadable costs no step
                if self._step > self._first:
                    self._save()
                raise
            if self._step + 1 < total:
                following = reader.submit(self._read, self._step + 2)
            self._take_step(encode(self._vae, pixels, own.vae_batch_size))
            self._read_metrics(keep=1)
            epoch = (self._step * own.batch_size - 1) // images + 1
            progress.update(self._step, epoch=epoch, loss=self._average.mean)
            if self._step < total and not interrupt.requested:
                if kept is not None and self._step % watching.validate_every_n_steps == 0:
                    self._validate(kept)
                if self._step % watching.save_every_n_steps == 0:
                    self._save()

    def _take_step(self, latents: Latents) -> None:
        own = self._options.training
        self._network.train()
        with self._precision():
            refined = self._network(latents.given)
        loss = conditional_loss(refined.float() * self._factor, latents.wanted * self._factor, own.loss_type).mean()
        loss.backward()
        if own.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), own.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        self._pending.push(self._step, {"loss": loss})

    def _read(self, step: int) -> Pixels:
        """Read the crops of a step, which is counted from 1."""
        count = self._options.training.batch_size
        pixels = self._crops.read(range((step - 1) * count, step * count))
        return pixels.pinned() if self._device.type == "cuda" else pixels

    def _precision(self) -> torch.autocast:
        enabled = self._options.training.mixed_precision == "bf16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)

    # ---- watching ----

    def _read_metrics(self, *, keep: int) -> None:
        """Read the losses of earlier steps.

        Raises:
            UserError: one is not finite.
        """
        for metrics in self._pending.pop(keep=keep):
            loss = metrics.values["loss"]
            if not math.isfinite(loss):
                raise UserError(
                    f"step {metrics.step}: the loss is not finite; nothing was saved since. Lower --learning_rate, or "
                    f"use --mixed_precision no; {self._target} holds what was saved last, if anything was"
                )
            self._average.add(loss)

    def _encode_kept(self) -> Latents | None:
        """Return the latents to validate with, which are always the same, on the host."""
        if self._kept is None:
            return None
        found = [
            encode(self._vae, self._kept.read([number]), 1) for number in range(self._options.watching.validation_crops)
        ]
        given, wanted = (torch.cat([getattr(one, name).cpu() for one in found]) for name in ("given", "wanted"))
        return Latents(given, wanted)

    @torch.no_grad()
    def _validate(self, kept: Latents) -> Errors:
        """Measure and log the error on images kept from training, with batch norms as in use."""
        with self._weights_in_use():
            refined = torch.cat(
                [
                    self._network(part.to(self._device)).float().cpu()
                    for part in kept.given.split(self._options.training.batch_size)
                ]
            )
        self._found = Errors(
            lanczos=_root_mean_square((kept.given - kept.wanted) * self._factor),
            refined=_root_mean_square((refined - kept.wanted) * self._factor),
        )
        logger.info(
            "step %d, validation: error %.4f, of Lanczos alone %.4f (%.0f%%)",
            *(self._step, self._found.refined, self._found.lanczos, 100 * self._found.share),
        )
        return self._found

    @contextmanager
    def _weights_in_use(self) -> Iterator[None]:
        """Return a context in which the network is as its file will be."""
        self._network.eval()
        use_weights(self._optimizer, for_training=False)
        try:
            yield
        finally:
            use_weights(self._optimizer, for_training=True)
            self._network.train()

    def _say_what_begins(self, kept: Latents | None) -> None:
        own, (learned, held) = self._options.training, self._counts
        rows = [
            ("images", f"{learned} to learn from, {held} to validate with"),
            ("crops", f"{own.resolution} pixels from {small_side(self._options)}, {own.batch_size} a step"),
            ("network", f"{sum(p.numel() for p in self._network.parameters()) / 1e6:.2f} million weights"),
            ("steps", f"{self._step} done, {own.max_train_steps} in all"),
            ("device", str(self._device)),
        ]
        print_summary(rows, simple=self._simple)
        if kept is not None:
            self._validate(kept)

    # ---- files ----

    def _save(self) -> None:
        """Write the network and the state.

        Raises:
            UserError: a loss or a weight is not finite, or a file cannot be written.
        """
        self._read_metrics(keep=0)
        with self._weights_in_use():
            tensors: Mapping[str, Tensor] = self._network.state_dict()
            if bad := not_finite(tensors.items()):
                raise UserError(f"step {self._step}: not finite: {some_of(bad)}; not saved. Lower --learning_rate")
            save_tensors(self._target, tensors, self._metadata())
        write_state(
            state_file(self._target),
            step=self._step,
            settings=self._settings,
            network=self._network,
            optimizer=self._optimizer,
            schedule=self._schedule,
        )
        logger.info("step %d saved: %s", self._step, self._target)

    def _finish(self, kept: Latents | None) -> None:
        """Save after the last step."""
        if kept is not None:
            self._read_metrics(keep=0)
            self._validate(kept)
        self._save()

    def _metadata(self) -> dict[str, str]:
        """Return what the file says of its training; the VAE is compared where the network is used."""
        own = self._options.training
        found = {"step": str(self._step), "scale": f"{own.scale:g}", "seed": str(own.seed)}
        if self._found is not None:
            found |= {"error": f"{self._found.refined:.6g}", "error_of_lanczos": f"{self._found.lanczos:.6g}"}
        return {VAE_KEY: self._vae_identity} | {f"latent_upscaler.{name}": value for name, value in found.items()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self._network.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"--resume: {state_file(self._target)} does not fit ({str(error).splitlines()[0]}); begin anew with "
                "--overwrite"
            ) from None
        self._step = self._first = int(state["step"])


def _new_network(width: int, seed: int) -> LatentUpscaler:
    """Return a network that gives its input back: its last layer is zero, and the rest is drawn."""
    network = LatentUpscaler(width, max(width // 2, 1))
    generator = torch_generator(seed, "upscaler weights")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # He et al. 2015, eq. 10
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(network.conv_final.weight)
    assert network.conv_final.bias is not None
    nn.init.zeros_(network.conv_final.bias)
    return network


def _checked_update(options: UpscalerOptions) -> tuple[OptimizerChoice, ScheduleSettings]:
    """Return the optimizer and the schedule, checked before anything is loaded."""
    own = options.training
    choice = resolve_optimizer(own.optimizer_type, False, False, own.optimizer_args, own.learning_rate)
    schedule = ScheduleSettings(name=own.lr_scheduler, warmup=own.lr_warmup_steps)
    for warning in (*choice.warnings, *check_scheduler(choice, schedule)):
        logger.warning("%s", warning)
    return choice, schedule


def _recorded(options: UpscalerOptions, choice: OptimizerChoice, images: str, vae: str) -> dict[str, object]:
    """Return all that the result depends on, by option."""
    own = options.training
    names = """
        width batch_size resolution scale flip_aug seed learning_rate lr_scheduler lr_warmup_steps max_grad_norm
        loss_type mixed_precision
    """.split()
    found: dict[str, object] = {f"--{name}": getattr(own, name) for name in names}
    found["--optimizer_type"] = choice.metadata_name
    found["--validation_split"] = options.watching.validation_split
    if own.lr_scheduler not in _ENDLESS or isinstance(own.lr_warmup_steps, float):
        found["--max_train_steps"] = own.max_train_steps
    return found | {"images of --train_data_dir": images, "--vae_path": vae}


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
