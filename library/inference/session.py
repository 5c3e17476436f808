"""A loaded model of ``gen_img.py`` and its networks, which generates planned images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from library.architectures.base import Architecture
from library.architectures.conditioning import Conditioning
from library.config.image_settings import ImageSettings
from library.inference.denoise import wanted_features
from library.inference.feature_options.control_net import ControlOptions
from library.inference.features import all_features, prompt_options
from library.inference.file_names import FileNames, try_folder
from library.inference.finishing import Finisher
from library.inference.generate import encode_texts, generate_latents
from library.inference.grid import combinations, draw_sheet
from library.inference.highres_fix import HighresFix, latents_of_two_stages
from library.inference.loading import load_models
from library.inference.models import GenerateOptions
from library.inference.networks import NetworkChoice, apply_networks, set_multipliers
from library.inference.options import ImageOptions, SpeedOptions
from library.inference.plan import SEEDS, PlannedImage, Repetition, batches, plan_images
from library.inference.png import save_png
from library.inference.prompt_line import parse_image_prompt
from library.inference.prompt_module import PromptModule
from library.inference.region_masks import parts_of
from library.inference.settings import random_seed
from library.inference.sources import Sources
from library.inference.strengths import axes_of, check_multipliers, merged_count, multipliers_of
from library.inference.upscaling import load_upscaler
from library.randomness import key

if TYPE_CHECKING:
    from PIL.Image import Image

#: tokens of a text in one window
_WINDOW = 75
#: images whose texts are encoded together
_ENCODED_AHEAD = 64
#: what images may get, in the order in which it is prepared and wrapped
FEATURES = all_features()

logger = logging.getLogger(__name__)


class Session:
    """A loaded model and its networks, which generates planned images."""

    def __init__(
        self,
        options: ImageOptions,
        architecture: Architecture,
        checkpoint: Any,
        common: ImageSettings,
        sources: Sources,
        choices: Sequence[NetworkChoice],
    ) -> None:
        try_folder(Path(options.image.outdir))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if options.speed.fp16 else torch.bfloat16 if options.speed.bf16 else torch.float32
        models = load_models(options, architecture, checkpoint, dtype, device)
        self._merged = merged_count(options, choices)
        self._axes = axes_of(options, choices)
        networks = apply_networks(choices, models, merge=self._merged, dtype=dtype, device=device)
        names = [Path(choice.weights).name for choice in choices[self._merged :]]
        models = replace(models, adapters=networks, adapter_names=names)
        loaded = {feature: feature.load(options, models, checkpoint, dtype, device) for feature in FEATURES}
        self._models = replace(models, of_features={kind: one for kind, one in loaded.items() if one is not None})
        self._how = GenerateOptions(
            device=device,
            dtype=dtype,
            zero_terminal_snr=options.model.zero_terminal_snr,
            zero_steps_offset=options.image.force_scheduler_zero_steps_offset,
            clip_skip=options.model.clip_skip,
            max_token_length=_WINDOW * (options.model.max_embeddings_multiples or 1),
            vae_batch_size=_vae_batch_size(options.speed),
        )
        self._options = options
        self._common = common
        self._sources = sources
        self._choices = choices
        self._fix = _highres_fix(options, device, dtype)
        self._model_name = Path(options.model.ckpt or "").name
        self._files = FileNames(Path(options.image.outdir), sequential=options.image.sequential_file_name)
        self._encoded: dict[int, dict[str, Conditioning]] = {}  # by the number of windows
        self._multipliers: tuple[float, ...] | None = None
        self._typed = 0

    def generate_typed(self, line: str, where: str) -> list[Path]:
        """Generate the images of one typed line."""
        multiple = self._models.architecture.latent.stride
        prompt = parse_image_prompt(line, where=where, size_multiple=multiple, options=prompt_options())
        check_multipliers([prompt], self._choices, self._merged)
        planned = self._sources.assigned(plan_images([prompt], self._common, repetition(self._options)), self._typed)
        self._typed += len(planned)
        return self.generate_planned(planned)

    def generate_planned(self, planned: Sequence[PlannedImage]) -> list[Path]:
        """Generate images, or with ``--grid`` a sheet of each."""
        if not self._axes:
            return self.generate(planned)
        written: list[Path] = []
        applied = [choice.multiplier for choice in self._choices[self._merged :]]
        for image in planned:
            parts = combinations(image, self._axes, applied)
            paths = self.generate(parts)
            sheet = draw_sheet([PIL.Image.open(path) for path in paths], self._axes)
            path = paths[0].with_stem(f"{paths[0].stem}_grid")
            save_png(sheet, path, image.settings.record(model=self._model_name))
            logger.info("grid: %s", path)
            written += [*paths, path]
        return written

    def generate_module(self, prompts: PromptModule) -> list[Path]:
        """Generate the prompts of a module as they come."""
        options, written, place = self._options, [], 0
        how = repetition(options)
        for where, line, iteration in prompts.lines(options, self._models, how):
            prompt = parse_image_prompt(
                line, where=where, size_multiple=self._models.architecture.latent.stride, options=prompt_options()
            )
            check_multipliers([prompt], self._choices, self._merged)
            seed = how.seed + iteration if how.iter_same_seed else key(how.seed, "image", iteration, place) % SEEDS
            once = replace(how, seed=seed, n_iter=1)
            planned = self._sources.assigned(plan_images([prompt], self._common, once), place)
            place += len(planned)
            written += self.generate_planned(planned)
        return written

    def free(self) -> None:
        """Free the memory of what was computed."""
        self._encoded.clear()
        if self._how.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(self, planned: Sequence[PlannedImage]) -> list[Path]:
        """Generate and save images, batch by batch; returns their files.

        While a batch is decoded and saved, the next one is generated.
        """
        written: list[Path] = []
        with Finisher(self._models, self._how) as finisher:
            for windows, batch in self._batches(planned):
                how = replace(self._how, max_token_length=_WINDOW * windows)
                multipliers = multipliers_of(batch[0].multipliers, self._choices, self._merged)
                self._set_multipliers(multipliers)
                settings = [image.settings for image in batch]
                features = wanted_features(settings[0], FEATURES)
                encoded = self._encode_ahead(planned[len(written) :], windows, how)
                small: list[Image] = []
                if self._fix is not None:
                    second = wanted_features(self._fix.second(settings[0]), FEATURES)
                    small, latents = latents_of_two_stages(
                        self._models, settings, how, encoded, self._fix, features, second
                    )
                else:
                    latents = generate_latents(self._models, settings, how, encoded, features)
                network = ", ".join(
                    f"{Path(c.weights).name}:{m:g}" for c, m in zip(self._choices, multipliers, strict=True)
                )
                paths = [self._path(image) for image in batch]
                for place, (image, path) in enumerate(zip(batch, paths, strict=True)):
                    if self._fix is not None and self._fix.saves_first:
                        record = self._fix.first(image.settings).record(model=self._model_name, network=network)
                        save_png(small[place], path.with_stem(f"{path.stem}_1st"), record)
                records = [one.record(model=self._model_name, network=network) for one in settings]
                finisher.finish(latents, paths, records)
                for path in paths:
                    written.append(path)
                    logger.info("image %d of %d: %s", len(written), len(planned), path)
        return written

    def _batches(self, planned: Sequence[PlannedImage]) -> Iterator[tuple[int, list[PlannedImage]]]:
        """Yield batches of neighbours whose texts need the same number of windows, with that number."""
        for windows, images in itertools.groupby(planned, key=self._windows):
            for batch in batches(list(images), self._options.speed.batch_size):
                yield windows, batch

    def _windows(self, image: PlannedImage) -> int:
        """Return how many windows the texts of an image need, at most those of ``--max_embeddings_multiples``.

        It follows from the image alone, so that the image does not depend on its batch.
        """
        most, models = self._options.model.max_embeddings_multiples or 1, self._models
        if most == 1:
            return 1
        limit = _WINDOW * most
        lengths = [
            models.architecture.caption_length(models.tokenizers, text, max_token_length=limit, weighted=True).tokens
            for text in (*parts_of(image.settings.prompt), image.settings.negative_prompt)
        ]
        return min(max(-(-max(lengths) // _WINDOW), 1), most)

    def _encode_ahead(
        self, left: Sequence[PlannedImage], windows: int, how: GenerateOptions
    ) -> dict[str, Conditioning]:
        """Return the encodings of the first image; if it lacks some, those of the next images are made with it.

        The text encoders are then on the device once for many images.
        """
        known, models = self._encoded.setdefault(windows, {}), self._models
        first = left[0]

        def texts_of(image: PlannedImage) -> tuple[str, ...]:
            return image.settings.texts(models.architecture.for_image(image.settings).worded)

        if any(text not in known for text in texts_of(first)):
            near = [
                image
                for image in left[:_ENCODED_AHEAD]
                if image.multipliers == first.multipliers and self._windows(image) == windows
            ]
            texts = dict.fromkeys(text for image in near for text in texts_of(image))
            missing = [text for text in texts if text not in known]
            found = encode_texts(models.architecture, models.tokenizers, models.text_encoders, missing, how)
            # what earlier images had is forgotten, or many prompts would fill the device
            self._encoded[windows] = {text: found.get(text) or known[text] for text in texts}
        return self._encoded[windows]

    def _path(self, image: PlannedImage) -> Path:
        if image.file_name is not None:
            return self._files.named(image.file_name)
        if self._options.image.use_original_file_name and image.settings.image is not None:
            return self._files.once(image.settings.image.stem)
        return self._files.next(image.settings.seed)

    def _set_multipliers(self, wanted: tuple[float, ...]) -> None:
        if wanted == self._multipliers:
            return
        merges_each = self._options.networks.network_pre_calc and self._sources.regions is None
        set_multipliers(self._models, wanted[self._merged :], merges_each=merges_each)
        self._multipliers = wanted
        self._encoded.clear()


def _vae_batch_size(options: SpeedOptions) -> int:
    size = 1.0 if options.vae_batch_size is None else options.vae_batch_size
    return max(int(size if size >= 1 else size * options.batch_size), 1)


def _highres_fix(all_options: ImageOptions, device: torch.device, dtype: torch.dtype) -> HighresFix | None:
    options = all_options.highres
    if options.highres_fix_scale is None:
        return None
    upscaler = None
    if options.highres_fix_upscaler:
        upscaler = load_upscaler(options.highres_fix_upscaler, options.highres_fix_upscaler_args, device, dtype)
    return HighresFix(
        scale=options.highres_fix_scale,
        steps=options.highres_fix_steps,
        strength=options.highres_fix_strength,
        saves_first=options.highres_fix_save_1st,
        in_latents=options.highres_fix_latents_upscaling,
        upscaler=upscaler,
        keeps_control=not all_options.of(ControlOptions).highres_fix_disable_control_net,
    )


def repetition(options: ImageOptions) -> Repetition:
    """Return the repetitions of each prompt; without ``--seed`` a seed is drawn and shown."""
    given = options.prompts
    seed = given.seed
    if seed is None:
        seed = random_seed()
        logger.info("seed: %d", seed)
    return Repetition(seed, given.n_iter, given.images_per_prompt, given.iter_same_seed, given.shuffle_prompts)
