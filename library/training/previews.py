"""Generate sample images during training: the same prompts and seeds, at chosen steps, without changing the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.architectures.base import Architecture, Conditioning, ModelInfo
from library.config.arguments import RunOptions
from library.diffusion.objective import Objective
from library.inference.prompt_line import SamplePrompt
from library.interrupt import Stopped
from library.training import precision
from library.training.models import Models
from library.training.run import Run
from library.training.sample_prompts import SamplePrompts
from library.training.settings import for_model, sample_prompts
from library.training.text_caching import TextModels

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.models import GenerateOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviewPolicy:
    """The times of sample images; epochs win over steps if both are given, as published."""

    every_n_steps: int | None
    every_n_epochs: int | None
    at_first: bool
    prompts: tuple[SamplePrompt, ...]

    def due_at_start(self) -> bool:
        return bool(self.prompts) and self.at_first

    def due_after_step(self, step: int) -> bool:
        if not self.prompts or self.every_n_epochs is not None or not self.every_n_steps:
            return False
        return step % self.every_n_steps == 0

    def due_after_epoch(self, epoch: int) -> bool:
        return bool(self.prompts) and bool(self.every_n_epochs) and epoch % self.every_n_epochs == 0


def preview_path(
    directory: Path, output_name: str | None, *, epoch: int | None, step: int, index: int, seed: int | None
) -> Path:
    """``<output_dir>/sample/[<name>_]{e<epoch>|<step>}_<index>_<time>[_<seed>].png``, as published."""
    prefix = f"{output_name}_" if output_name else ""
    when = f"e{epoch:06d}" if epoch is not None else f"{step:06d}"
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
    suffix = f"_{seed}" if seed is not None else ""
    return directory / "sample" / f"{prefix}{when}_{index:02d}_{stamp}{suffix}.png"


class PreviewGenerator:
    """Generates the sample images of one run with the present weights.

    Args:
        modules: trained modules beside the models; in eval mode during sampling.
        prompts: conditioning by text, where texts are cached.
        options: of the run.
    """

    def __init__(
        self,
        architecture: Architecture,
        models: Models,
        modules: Sequence[nn.Module],
        objective: Objective,
        info: ModelInfo,
        options: RunOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        prompts: Mapping[str, Conditioning],
    ) -> None:
        from library.inference.models import ImageModels

        self._architecture = architecture
        self._objective = objective
        self._options = options
        self._how = generate_options(options, device=device, dtype=dtype)
        self._models = ImageModels(
            architecture=architecture,
            tokenizers=models.tokenizers,
            text_encoders=models.encoding,
            cached_texts=prompts,
            denoiser=models.denoiser,
            vae=models.vae,
            v_prediction=info.v_prediction,
            adapters=modules,
        )

    def __call__(self, prompt: SamplePrompt, path: Path | None, check: Callable[[], None] = lambda: None) -> Image:
        """Generate one image, and save it with its settings if a path is given.

        Args:
            check: called before each denoising step; an exception from it ends the generation.
        """
        from library.inference.generate import generate_image
        from library.inference.png import save_png
        from library.inference.settings import settings_for

        sampler = self._objective.sampler(prompt.sample_sampler, self._options.sample.sample_sampler)
        settings = settings_for(prompt, self._architecture.sample_defaults, sampler=sampler)
        with precision.drawing(self._options.training):
            image = generate_image(self._models, settings, replace(self._how, check=check))
        if path is not None:
            name = Path(self._options.model.pretrained_model_name_or_path).name
            save_png(image, path, settings.record(model=name, network=self._options.output.output_name or ""))
        return image


def generate_options(options: RunOptions, *, device: torch.device, dtype: torch.dtype) -> GenerateOptions:
    """Return the settings for generating the sample images of a run."""
    from library.inference.models import GenerateOptions

    return GenerateOptions(
        device=device,
        dtype=dtype,
        zero_terminal_snr=options.noise.zero_terminal_snr,
        clip_skip=options.model.clip_skip,
        max_token_length=options.model.max_token_length,
    )


def current_prompts(run: Run, encoded: Mapping[str, Conditioning]) -> SamplePrompts:
    """Return the prompts of a run's sample images, which are read from their file at each sampling.

    Args:
        encoded: texts that were encoded before training, if encoders are not loaded for it.
    """
    from library.inference.settings import settings_for

    options, architecture = run.options, run.architecture

    def read() -> tuple[SamplePrompt, ...]:
        prompts = for_model(sample_prompts(options, architecture), architecture)
        for prompt in prompts:
            run.objective.sampler(prompt.sample_sampler, options.sample.sample_sampler)
        return prompts

    return SamplePrompts(
        run.checked.prompts,
        read,
        texts_of=lambda prompt: settings_for(prompt, architecture.sample_defaults, sampler="").texts(
            architecture.worded
        ),
        encoded=encoded if any(run.cached_encoders) else None,
    )


def encode_prompts(
    architecture: Architecture, prompts: Sequence[SamplePrompt], options: GenerateOptions, models: TextModels
) -> dict[str, Conditioning]:
    """Encode the texts of sample images, on the host, so that the encoders can be freed."""
    from library.inference.generate import encode_texts
    from library.inference.settings import settings_for

    texts: dict[str, None] = {}
    for prompt in prompts:
        settings = settings_for(prompt, architecture.sample_defaults, sampler="")
        texts |= dict.fromkeys(settings.texts(architecture.worded))
    encoded = encode_texts(architecture, models.tokenizers, models.encoders, list(texts), options)
    return {text: found.to("cpu") for text, found in encoded.items()}


def generate_previews(
    prompts: Sequence[SamplePrompt],
    draw: Callable[[SamplePrompt, Path | None], Image],
    path_of: Callable[[int, SamplePrompt], Path],
    *,
    rank: int,
    world_size: int,
    together: bool = False,
) -> dict[str, Image]:
    """Generate and save this process's part of the images; returns them under the trackers' names.

    Args:
        draw: saves to the path, if given; may raise Stopped, which ends the rest, and NotFinite.
        together: every process generates all images, because a sharded model needs all processes; the first one keeps
        them.
    """
    from library.inference.failures import NotFinite

    drawn: dict[str, Image] = {}
    for index, prompt in enumerate(prompts):
        is_mine = rank == (0 if together else index % world_size)
        if not is_mine and not together:
            continue
        path = path_of(index, prompt) if is_mine else None
        try:
            image = draw(prompt, path)
        except Stopped:
            logger.warning("sample images: stopped after %d of %d", len(drawn), len(prompts))
            break
        except NotFinite as error:  # the run itself reports what is not finite
            logger.warning('sample image of "%s" left out: %s', prompt.prompt, error)
            continue
        if is_mine:
            drawn[f"sample_{index}"] = image
            logger.info("sample image: %s", path)
    return drawn


def of_all_processes(drawn: dict[str, Image]) -> dict[str, Image]:
    """Gather the images of all processes on each of them, for the main one's trackers. All must take part."""
    from accelerate.utils import gather_object

    return {name: image for share in gather_object([drawn]) for name, image in share.items()}
