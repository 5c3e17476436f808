"""Make the caches of a run: by a trainer before the first step, or by the tools in ``tools/``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.architectures.base import Architecture
from library.config.arguments import ModelOptions, RunOptions
from library.config.work_progress import WorkProgress
from library.data.dataset import TrainingData
from library.data.latent_cache import Encode
from library.interrupt import Interrupt
from library.training.precision import vae_dtype
from library.training.processes import peers_of

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def inspect_model(architecture: Architecture, options: ModelOptions) -> Any:
    """Find and recognize the model that the options name; see ``Architecture.inspect``."""
    return architecture.inspect(
        options.source,
        v2=options.v2,
        v_parameterization=options.v_parameterization,
        vae=options.vae,
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        disable_mmap=options.disable_mmap_load_safetensors,
    )


@dataclass(frozen=True)
class CacheJob:
    """The inputs of making caches."""

    architecture: Architecture
    checkpoint: Any  # result of the architecture's ``inspect``
    data: TrainingData
    options: RunOptions
    accelerator: Accelerator
    weight_dtype: torch.dtype
    interrupt: Interrupt

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def load_vae(self) -> nn.Module:
        """Load the VAE on the run's device."""
        dtype = vae_dtype(self.options.model, self.weight_dtype)
        return self.architecture.load_vae(self.checkpoint, dtype=dtype, device=str(self.device))

    def progress(self, title: str, unit: str) -> WorkProgress:
        """Return a progress display, which only the main process shows."""
        count = self.accelerator.num_processes
        return WorkProgress(
            f"{title} (process 1 of {count})" if count > 1 else title,
            unit,
            simple=self.options.console.console_log_simple,
            enabled=self.accelerator.is_main_process,
        )

    def stop_if_asked(self) -> None:
        """Raise SystemExit after Ctrl-C or SIGTERM, with the code that shells expect."""
        if self.interrupt.requested:
            logger.warning("stopped while caching; caches on disk are kept, and the same command continues")
            raise SystemExit(self.interrupt.exit_code)

    def release_memory(self) -> None:
        """Free the device memory of a removed model for later stages."""
        if self.device.type == "cuda" and not self.options.training.highvram:
            torch.cuda.empty_cache()


def cache_latents(job: CacheJob, *, keep_vae: bool = False) -> nn.Module | None:
    """Complete the latent cache: on disk by all processes together, in memory by each process for itself.

    Args:
        keep_vae: return the VAE, even if it was not needed; otherwise it is freed.

    Raises:
        UserError: an image that cannot be read; latents that are not finite; a full disk.
        SystemExit: after Ctrl-C or SIGTERM; another process had an error.
    """
    options = job.options.dataset
    vae: nn.Module | None = None

    def encoder() -> Encode:
        nonlocal vae
        vae = loaded = job.load_vae()

        def encode(pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            with torch.no_grad():
                pixels = pixels.to(job.device, non_blocking=True)
                return job.architecture.encode_images(loaded, pixels, generators)

        return encode

    with job.progress("encoding images", "images") as progress:

        def report(done: int, total: int) -> None:
            progress.update(done, total)
            job.stop_if_asked()

        made = job.data.cache_latents(
            encoder,
            batch_size=options.vae_batch_size,
            to_disk=options.cache_latents_to_disk,
            vae_identity=job.architecture.vae_identity(job.checkpoint),
            trust=options.skip_cache_check,
            report=report,
            peers=peers_of(job.accelerator),
            pin_memory=job.device.type == "cuda",
        )
    if job.accelerator.is_main_process:
        shared = job.accelerator.num_processes if options.cache_latents_to_disk else 1
        by = f" by {shared} processes" if made and shared > 1 else ""
        logger.info("latents: %d encoded%s, %d from the cache", made, by, job.data.image_count() - made)
    if keep_vae and vae is None:
        vae = job.load_vae()
    elif not keep_vae:
        vae = None
    job.release_memory()
    return vae
