"""Plan the images of ``gen_img.py``: order, seeds and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.config.image_settings import ImageSettings
from library.inference.prompt_line import ImagePrompt
from library.randomness import key, python_rng

#: number of seeds that are drawn
SEEDS = 2**32


@dataclass(frozen=True)
class PlannedImage:
    settings: ImageSettings
    multipliers: tuple[float, ...] = ()  # of the additional networks; empty: as on the command line
    file_name: str | None = None  # of the prompt's own choice
    place: int = 0  # in its iteration, by which source images are chosen


@dataclass(frozen=True)
class Repetition:
    """The repetitions of each prompt, and the source of seeds."""

    seed: int
    n_iter: int = 1
    images_per_prompt: int = 1
    iter_same_seed: bool = False
    shuffle_prompts: bool = False


def plan_images(prompts: Sequence[ImagePrompt], common: ImageSettings, repetition: Repetition) -> list[PlannedImage]:
    """Return all images of a run.

    A prompt's own seeds (``--d``) win; after the last of them it counts on by one. Otherwise image i of a
    prompt has its base seed plus i. The base is the run's seed for a single prompt, and for several prompts or
    iterations a draw keyed by seed, iteration and prompt. With ``iter_same_seed`` all prompts of an iteration
    share one base. Shuffling changes the order, not the seeds. A prompt with choices in braces draws them anew for
    each image, keyed by its seed; one that enumerates has an image for each choice, all with the first seed.

    Args:
        prompts: in the order of the command line or file.
        common: settings that a prompt does not set itself; its prompt and seed are not used.
    """
    planned = []
    for iteration in range(repetition.n_iter):
        order = list(range(len(prompts)))
        if repetition.shuffle_prompts:
            python_rng(repetition.seed, "prompt order", iteration).shuffle(order)
        place = 0
        for index in order:
            prompt = prompts[index]
            base = _base_seed(repetition, iteration, index, len(prompts))
            template = prompt.template
            count = 1 if template is not None and template.enumerates else repetition.images_per_prompt
            for i in range(count):
                seed = _seed(prompt, base, i)
                for one in [prompt] if template is None else template.prompts(seed):
                    name = one.file_name if i == 0 else None
                    planned.append(PlannedImage(_settings(one, common, seed), one.multipliers, name, place))
                    place += 1
    return planned


def _base_seed(repetition: Repetition, iteration: int, index: int, num_prompts: int) -> int:
    if repetition.iter_same_seed:
        return repetition.seed + iteration * repetition.images_per_prompt
    if repetition.n_iter * num_prompts == 1:
        return repetition.seed
    return key(repetition.seed, "image", iteration, index) % SEEDS


def _seed(prompt: ImagePrompt, base: int, i: int) -> int:
    own = prompt.seeds
    if not own:
        return base + i
    return own[i] if i < len(own) else own[-1] + i - len(own) + 1


def _settings(prompt: ImagePrompt, common: ImageSettings, seed: int) -> ImageSettings:
    return common.changed({**prompt.given(), "prompt": prompt.prompt, "seed": seed})


def batches(planned: Sequence[PlannedImage], batch_size: int) -> Iterator[list[PlannedImage]]:
    """Yield neighbours that differ only in text and seed, up to ``batch_size`` at once."""
    batch: list[PlannedImage] = []
    for image in planned:
        fits = not batch or (
            batch[0].settings.shares_batch_with(image.settings) and batch[0].multipliers == image.multipliers
        )
        if batch and (not fits or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
