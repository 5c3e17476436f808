"""Generate sample images during training: the same prompts and seeds, at chosen steps, without changing the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.architectures.model_info import ModelInfo
from library.config.arguments import RunOptions
from library.diffusion.objective import Objective
from library.inference.prompt_line import SamplePrompt
from library.interrupt import Stopped
from library.training import precision
from library.training.models import Models
from library.training.sample_prompts import SamplePrompts
from library.training.settings import for_model, sample_prompts
from library.training.text_caching import TextModels

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.denoise import Feature
    from library.inference.models import GenerateOptions

    #: (prompts, paths) -> images, which it saves to the paths that are given
    Generate = Callable[[Sequence[SamplePrompt], Sequence[Path | None]], Sequence[Image]]

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
        return bool(self.prompts and self.every_n_epochs) and epoch % (self.every_n_epochs or 1) == 0


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
        of_features: models that are used by features, see ``Kind.features``.
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
        of_features: Mapping[type[Feature], Any] = MappingProxyType({}),
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
            of_features=of_features,
        )

    @property
    def batch_size(self) -> int:
        """Return how many images of equal settings are generated together."""
        return self._architecture.sample_batch_size

    def __call__(
        self,
        prompts: Sequence[SamplePrompt],
        paths: Sequence[Path | None],
        check: Callable[[], None] = lambda: None,
    ) -> list[Image]:
        """Generate a batch of images, and save each with its settings if it has a path.

        Args:
            prompts: of equal settings; only texts and seeds may differ.
            check: called before each denoising step; an exception from it ends the generation.
        """
        from library.inference.generate import generate_images
        from library.inference.png import save_png
        from library.inference.settings import settings_for

        defaults, usual = self._architecture.sample_defaults, self._options.sample.sample_sampler
        batch = [
            settings_for(prompt, defaults, sampler=self._objective.sampler(prompt.sample_sampler, usual))
            for prompt in prompts
        ]
        images_read = [prompt.controlnet_image for prompt in prompts]
        batch = [
            replace(s, control=(Path(image),)) if image else s for s, image in zip(batch, images_read, strict=True)
        ]
        features = [feature() for feature in self._models.of_features]
        with precision.generating(self._options.training):
            images = generate_images(self._models, batch, replace(self._how, check=check), features=features)
        name = Path(self._options.model.source).name
        for settings, image, path in zip(batch, images, paths, strict=True):
            if path is not None:
                save_png(image, path, settings.record(model=name, network=self._options.output.output_name or ""))
        return images


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


def current_prompts(
    first: Sequence[SamplePrompt],
    options: RunOptions,
    architecture: Architecture,
    objective: Objective,
    *,
    reads_images: bool,
    encoded: Mapping[str, Conditioning] | None,
) -> SamplePrompts:
    """Return the prompts of a run's sample images, which are read from their file at each sampling.

    Args:
        first: those that were read and checked at the start.
        reads_images: whether a prompt may name images.
        encoded: texts that were encoded before training, if encoders are not loaded for it.
    """

    def read() -> tuple[SamplePrompt, ...]:
        prompts = for_model(sample_prompts(options, architecture, reads_images=reads_images), architecture)
        for prompt in prompts:
            objective.sampler(prompt.sample_sampler, options.sample.sample_sampler)
        return prompts

    return SamplePrompts(
        tuple(first), read, texts_of=lambda prompt: texts_of_prompt(architecture, prompt), encoded=encoded
    )


def texts_of_prompt(architecture: Architecture, prompt: SamplePrompt) -> tuple[str, ...]:
    """Return the texts of a sample image, as the text encoders read them."""
    from library.inference.settings import settings_for

    settings = settings_for(prompt, architecture.sample_defaults, sampler="")
    return settings.texts(architecture.for_image(settings).worded)


def encode_prompts(
    architecture: Architecture, prompts: Sequence[SamplePrompt], options: GenerateOptions, models: TextModels
) -> dict[str, Conditioning]:
    """Encode the texts of sample images, on the host, so that the encoders can be freed."""
    from library.inference.generate import encode_texts

    texts = dict.fromkeys(text for prompt in prompts for text in texts_of_prompt(architecture, prompt))
    encoded = encode_texts(architecture, models.tokenizers, models.encoders, list(texts), options)
    return {text: found.to("cpu") for text, found in encoded.items()}


def generate_previews(
    prompts: Sequence[SamplePrompt],
    generate: Generate,
    path_of: Callable[[int, SamplePrompt], Path],
    *,
    rank: int,
    world_size: int,
    on_all_processes: bool = False,
    batch_size: int = 1,
) -> dict[str, Image]:
    """Generate and save this process's part of the images; returns them under the trackers' names.

    Args:
        generate: may raise Stopped, which ends the rest, and NotFinite.
        on_all_processes: every process generates all images, because a sharded model needs all processes; the first
            one keeps them.
        batch_size: the most images of equal settings that are generated together.
    """
    found: dict[str, Image] = {}
    mine = [index for index in range(len(prompts)) if on_all_processes or index % world_size == rank]
    for batch in _batches(mine, prompts, batch_size):
        keeps = rank == 0 or not on_all_processes
        paths = {index: path_of(index, prompts[index]) if keeps else None for index in batch}
        try:
            images = _finite_images(batch, prompts, generate, paths)
        except Stopped:
            logger.warning("sample images: stopped after %d of %d", len(found), len(prompts))
            break
        for index, image in images.items() if keeps else ():
            found[f"sample_{index}"] = image
            logger.info("sample image: %s", paths[index])
    return dict(sorted(found.items(), key=lambda pair: int(pair[0].removeprefix("sample_"))))


def _batches(mine: Sequence[int], prompts: Sequence[SamplePrompt], size: int) -> Iterator[list[int]]:
    """Yield the places of prompts that are generated together: of equal settings, at most ``size``."""
    left = list(mine)
    while left:
        settings = _without_texts(prompts[left[0]])
        batch = [index for index in left if _without_texts(prompts[index]) == settings][:size]
        left = [index for index in left if index not in batch]
        yield batch


def _without_texts(prompt: SamplePrompt) -> SamplePrompt:
    """Return the settings that all images of a batch share."""
    return replace(prompt, prompt="", negative_prompt=None, seed=None)


def _finite_images(
    batch: Sequence[int],
    prompts: Sequence[SamplePrompt],
    generate: Generate,
    paths: Mapping[int, Path | None],
) -> dict[int, Image]:
    """Return the images of a batch by their place; one that is not finite is left out, the others are not."""
    from library.inference.failures import NotFinite

    try:
        images = generate([prompts[index] for index in batch], [paths[index] for index in batch])
    except NotFinite as error:
        if len(batch) > 1:
            return {i: image for one in batch for i, image in _finite_images([one], prompts, generate, paths).items()}
        # the run itself reports what is not finite
        logger.warning('sample image of "%s" left out: %s', prompts[batch[0]].prompt, error)
        return {}
    return dict(zip(batch, images, strict=True))


def of_all_processes(images: dict[str, Image]) -> dict[str, Image]:
    """Gather the images of all processes on each of them, for the main one's trackers. All must take part."""
    from accelerate.utils import gather_object

    return {name: image for share in gather_object([images]) for name, image in share.items()}
