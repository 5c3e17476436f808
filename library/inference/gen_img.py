"""Run ``gen_img.py``: read prompts, load, apply networks, generate, save."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import PIL.Image
import torch

from library.architectures.base import Architecture, Conditioning
from library.config.console import setup_console
from library.errors import UserError
from library.files.safetensors_io import read_header
from library.inference.denoise import wanted_features
from library.inference.failures import naming_memory
from library.inference.features import all_features, prompt_options
from library.inference.file_names import FileNames, try_folder
from library.inference.generate import generate_images
from library.inference.grid import Axis, combinations, draw_sheet, read_axes
from library.inference.highres_fix import HighresFix, generate_in_two_stages
from library.inference.interactive import generate_lines
from library.inference.messages import for_images
from library.inference.models import GenerateOptions, ImageModels
from library.inference.native_size import native_size
from library.inference.networks import NetworkChoice, apply_networks, choose_networks, set_multipliers
from library.inference.options import (
    SHRINK_NAMES,
    SIZE_NAMES,
    ImageOptions,
    SpeedOptions,
    idle_options,
)
from library.inference.plan import PlannedImage, Repetition, batches, plan_images
from library.inference.png import save_png
from library.inference.prompt_line import ImagePrompt, parse_image_prompt, read_image_prompts, usable_size
from library.inference.settings import ImageSettings, random_seed
from library.inference.sources import Sources, find_sources, prompts_of_images
from library.inference.textual_inversion import (
    add_bundled_words,
    add_embeddings,
    add_layered_embeddings,
    read_layered_vectors,
    read_vectors,
)

if TYPE_CHECKING:
    from PIL.Image import Image

#: what images may get, in the order in which it is prepared and wrapped
FEATURES = all_features()

MEMORY_REMEDY = "try a smaller one, a smaller --batch_size, or --bf16"

logger = logging.getLogger(__name__)


def draw_images(options: ImageOptions, architecture: Architecture, lines: TextIO | None = None) -> list[Path]:
    """Generate all images that the options ask for.

    Args:
        options: accepted by ``check_options``.
        architecture: the family of ``--ckpt``.
        lines: source of prompts with ``--interactive``; default is the keyboard.

    Returns:
        the files, in the order they were written.

    Raises:
        UserError: wrong prompts, checkpoint or networks.
    """
    setup_console(options.console)
    for warning in idle_options(options):
        logger.warning("%s", warning)
    prompts = _read_prompts(options, architecture)
    choices = choose_networks(
        options.networks.network_module,
        options.networks.network_weights,
        options.networks.network_mul,
        options.networks.network_args,
    )
    merged = _merged(options, choices)
    _axes(options, choices)  # its mistakes are found before anything is loaded
    _check_multipliers(prompts, choices, merged)
    checkpoint = _inspect(options, architecture)
    logger.info("model: %s, %s", checkpoint.path, checkpoint.info.description)
    for path in _embeddings(options):
        read_vectors(path, len(architecture.text_encoder_targets))
    for path in _layered_embeddings(options):
        read_layered_vectors(path)
    if options.networks.network_show_meta:
        _show_metadata(choices)
    common = _common_settings(options, architecture, checkpoint)
    _warn_of_sizes(architecture, common, prompts)
    for feature in FEATURES:
        feature.check(options, architecture, checkpoint)
    sources = Sources.of(options.image, options.control, networks=len(choices) - merged)
    planned = sources.assigned(plan_images(prompts, common, _repetition(options)))
    session = _Session(options, architecture, checkpoint, common, sources, choices)
    if options.prompts.interactive:
        return generate_lines(session, lines or sys.stdin, MEMORY_REMEDY)
    with naming_memory(MEMORY_REMEDY):
        return session.generate_planned(planned)


class _Session:
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
        models = _load(options, architecture, checkpoint, dtype, device)
        self._merged = _merged(options, choices)
        self._axes = _axes(options, choices)
        networks = apply_networks(choices, models, merge=self._merged, dtype=dtype, device=device)
        names = [Path(choice.weights).name for choice in choices[self._merged :]]
        models = replace(models, adapters=networks, adapter_names=names)
        loaded = {feature: feature.load(options, models, checkpoint, dtype, device) for feature in FEATURES}
        self._models = replace(models, of_features={kind: one for kind, one in loaded.items() if one is not None})
        self._how = GenerateOptions(
            device=device,
            dtype=dtype,
            zero_terminal_snr=options.model.zero_terminal_snr,
            clip_skip=options.model.clip_skip,
            max_token_length=75 * (options.model.max_embeddings_multiples or 1),
            vae_batch_size=_vae_batch_size(options.speed),
        )
        self._options = options
        self._common = common
        self._sources = sources
        self._choices = choices
        self._fix = _highres_fix(options)
        self._model_name = Path(options.model.ckpt or "").name
        self._files = FileNames(Path(options.image.outdir), sequential=options.image.sequential_file_name)
        self._encoded: dict[str, Conditioning] = {}
        self._multipliers: tuple[float, ...] | None = None
        self._typed = 0

    def generate_typed(self, line: str, where: str) -> list[Path]:
        """Generate the images of one typed line."""
        multiple = self._models.architecture.latent.stride
        prompt = parse_image_prompt(line, where=where, size_multiple=multiple, options=prompt_options())
        _check_multipliers([prompt], self._choices, self._merged)
        planned = self._sources.assigned(plan_images([prompt], self._common, _repetition(self._options)), self._typed)
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

    def free(self) -> None:
        """Free the memory of what was computed."""
        self._encoded.clear()
        if self._how.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(self, planned: Sequence[PlannedImage]) -> list[Path]:
        """Generate and save images, batch by batch; returns their files."""
        written: list[Path] = []
        for batch in batches(planned, self._options.speed.batch_size):
            multipliers = _multipliers(batch[0].multipliers, self._choices, self._merged)
            self._set_multipliers(multipliers)
            settings = [image.settings for image in batch]
            features = wanted_features(settings[0], FEATURES)
            small: list[Image] = []
            if self._fix is not None:
                second = wanted_features(self._fix.second(settings[0]), FEATURES)
                small, images = generate_in_two_stages(
                    self._models, settings, self._how, self._encoded, self._fix, features, second
                )
            else:
                images = generate_images(self._models, settings, self._how, self._encoded, features)
            network = ", ".join(
                f"{Path(c.weights).name}:{m:g}" for c, m in zip(self._choices, multipliers, strict=True)
            )
            for place, image in enumerate(batch):
                path = self._path(image)
                if self._fix is not None and self._fix.saves_first:
                    record = self._fix.first(image.settings).record(model=self._model_name, network=network)
                    save_png(small[place], path.with_stem(f"{path.stem}_1st"), record)
                save_png(images[place], path, image.settings.record(model=self._model_name, network=network))
                written.append(path)
                logger.info("image %d of %d: %s", len(written), len(planned), path)
        return written

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


def _highres_fix(all_options: ImageOptions) -> HighresFix | None:
    options = all_options.highres
    if options.highres_fix_scale is None:
        return None
    return HighresFix(
        scale=options.highres_fix_scale,
        steps=options.highres_fix_steps,
        strength=options.highres_fix_strength,
        saves_first=options.highres_fix_save_1st,
        in_latents=options.highres_fix_latents_upscaling,
        keeps_control=not all_options.control.highres_fix_disable_control_net,
    )


# ---- before loading ----


def _read_prompts(options: ImageOptions, architecture: Architecture) -> list[ImagePrompt]:
    multiple = architecture.latent.stride
    given = options.prompts
    if given.interactive:
        return []
    if given.from_file is not None:
        prompts = read_image_prompts(Path(given.from_file), size_multiple=multiple, options=prompt_options())
    elif given.prompt is not None:
        prompts = [parse_image_prompt(given.prompt, size_multiple=multiple, options=prompt_options())]
    else:
        prompts = prompts_of_images(find_sources(Path(options.image.image_path or ""), "--image_path"))
    return prompts


def _warn_of_sizes(architecture: Architecture, common: ImageSettings, prompts: Sequence[ImagePrompt]) -> None:
    """Warn of sizes that are given to a family without size conditioning."""
    given = {name for name in SIZE_NAMES if getattr(common, name) is not None}
    given |= {name for prompt in prompts for name in prompt.own if name in SIZE_NAMES}
    if given and type(architecture).condition is Architecture.condition:
        logger.warning("%s have no effect with this model, which is not conditioned on sizes", ", ".join(sorted(given)))


def _axes(options: ImageOptions, choices: Sequence[NetworkChoice]) -> list[Axis]:
    files = [Path(choice.weights) for choice in choices[_merged(options, choices) :]]
    started = bool(options.image.image_path) or options.highres.highres_fix_scale is not None
    return read_axes(options.prompts.grid or [], files, started=started)


def _merged(options: ImageOptions, choices: Sequence[NetworkChoice]) -> int:
    """Return how many of the networks are merged, the first ones."""
    if options.networks.network_merge_n_models is not None:
        return min(options.networks.network_merge_n_models, len(choices))
    return len(choices) if options.networks.network_merge else 0


def _check_multipliers(prompts: Sequence[ImagePrompt], choices: Sequence[NetworkChoice], merged: int) -> None:
    for prompt in prompts:
        if not prompt.multipliers:
            continue
        if merged and merged == len(choices):
            raise UserError(f'prompt "{prompt.prompt}": --am cannot be used with --network_merge')
        if len(prompt.multipliers) > len(choices) - merged:
            count = len(choices) - merged
            raise UserError(f'prompt "{prompt.prompt}": --am has {len(prompt.multipliers)} values for {count} networks')


def _multipliers(own: Sequence[float], choices: Sequence[NetworkChoice], merged: int) -> tuple[float, ...]:
    """Return the strengths of all networks: the command line's, or the prompt's own of the first that are applied."""
    given = [choice.multiplier for choice in choices]
    return (*given[:merged], *own, *given[merged + len(own) :])


def _inspect(options: ImageOptions, architecture: Architecture) -> Any:
    model = options.model
    try:
        return architecture.inspect(
            model.ckpt,
            v2=model.v2,
            v_parameterization=model.v_parameterization,
            vae=model.vae,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
        )
    except UserError as error:
        text = for_images(str(error), "--ckpt")
        text = text.replace("use gen_img.py --sdxl", "add --sdxl").replace("use gen_img.py", "drop --sdxl")
        raise UserError(text) from None


def _show_metadata(choices: Sequence[NetworkChoice]) -> None:
    for choice in choices:
        metadata = read_header(Path(choice.weights)).metadata
        logger.info("metadata of %s: %s", choice.weights, json.dumps(metadata, indent=2, ensure_ascii=False))


def _common_settings(options: ImageOptions, architecture: Architecture, checkpoint: Any) -> ImageSettings:
    native = native_size(Path(checkpoint.path), architecture.modelspec(checkpoint.info)["default_resolution"])
    image, shrink = options.image, options.deep_shrink
    multiple = architecture.latent.stride
    return ImageSettings(
        prompt="",
        negative_prompt="",
        width=usable_size(native[0] if image.W is None else image.W, "--W", multiple),
        height=usable_size(native[1] if image.H is None else image.H, "--H", multiple),
        steps=image.steps,
        scale=image.scale,
        sampler=image.sampler,
        seed=0,
        negative_scale=image.negative_scale,
        strength=image.strength,
        **{name: getattr(image, name) for name in SIZE_NAMES},
        **({name: getattr(shrink, name) for name in SHRINK_NAMES} if shrink.ds_depth_1 is not None else {}),
    )


def _repetition(options: ImageOptions) -> Repetition:
    given = options.prompts
    seed = given.seed
    if seed is None:
        seed = random_seed()
        logger.info("seed: %d", seed)
    return Repetition(seed, given.n_iter, given.images_per_prompt, given.iter_same_seed, given.shuffle_prompts)


# ---- loading ----


def _embeddings(options: ImageOptions) -> list[Path]:
    return [Path(path) for path in options.model.textual_inversion_embeddings or []]


def _layered_embeddings(options: ImageOptions) -> list[Path]:
    return [Path(path) for path in options.model.XTI_embeddings or []]


def _load(
    options: ImageOptions, architecture: Architecture, checkpoint: Any, dtype: torch.dtype, device: torch.device
) -> ImageModels:
    denoiser = architecture.load_denoiser(checkpoint, dtype=dtype, device=str(device))
    if options.speed.opt_channels_last:
        denoiser.to(memory_format=torch.channels_last)
    architecture.set_attention(denoiser, "xformers" if options.speed.xformers else "torch")
    vae_dtype = torch.float32 if options.model.no_half_vae else dtype
    tokenizers = architecture.load_tokenizers(checkpoint)
    encoders = architecture.load_text_encoders(checkpoint, dtype=dtype, device=str(device))
    add_embeddings(_embeddings(options), tokenizers, encoders)
    for network in options.networks.network_weights or []:
        add_bundled_words(Path(network), tokenizers, encoders)
    layers = architecture.text_layers(denoiser)
    add_layered_embeddings(_layered_embeddings(options), tokenizers[0], encoders[0], layers)
    return ImageModels(
        architecture=architecture,
        tokenizers=tokenizers,
        text_encoders=encoders,
        denoiser=denoiser,
        vae=architecture.load_vae(checkpoint, dtype=vae_dtype, device=str(device)),
        v_prediction=checkpoint.info.v_prediction,
    )
