"""Run ``gen_img.py``: read prompts, load, apply networks, generate, save."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from library.architectures.base import Architecture, Conditioning
from library.config.console import setup_console
from library.errors import UserError
from library.files.safetensors_io import read_header
from library.inference.failures import naming_memory
from library.inference.file_names import FileNames, try_folder
from library.inference.generate import generate_images
from library.inference.models import GenerateOptions, ImageModels
from library.inference.native_size import native_size
from library.inference.networks import NetworkChoice, apply_networks, choose_networks
from library.inference.options import ImageOptions
from library.inference.plan import PlannedImage, Repetition, batches, plan_images
from library.inference.png import save_png
from library.inference.prompt_line import ImagePrompt, parse_image_prompt, read_image_prompts, usable_size
from library.inference.settings import ImageSettings, random_seed
from library.memory.host_heap import keep_freed_memory

logger = logging.getLogger(__name__)


def draw_images(options: ImageOptions, architecture: Architecture) -> list[Path]:
    """Generate all images that the options ask for.

    Args:
        options: accepted by ``check_options``.
        architecture: the family of ``--ckpt``.

    Returns:
        the files, in the order they were written.

    Raises:
        UserError: wrong prompts, checkpoint or networks.
    """
    setup_console(options.console)
    prompts = _read_prompts(options, architecture)
    choices = choose_networks(
        options.networks.network_module,
        options.networks.network_weights,
        options.networks.network_mul,
        options.networks.network_args,
    )
    _check_multipliers(prompts, choices, merged=options.networks.network_merge)
    checkpoint = _inspect(options, architecture)
    logger.info("model: %s, %s", checkpoint.path, checkpoint.info.description)
    if options.networks.network_show_meta:
        _show_metadata(choices)
    common = _common_settings(options, architecture, checkpoint)
    planned = plan_images(prompts, common, _repetition(options))

    try_folder(Path(options.image.outdir))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    dtype = torch.float16 if options.speed.fp16 else torch.bfloat16 if options.speed.bf16 else torch.float32
    models = _load(options, architecture, checkpoint, dtype, device)
    networks = apply_networks(choices, models, merge=options.networks.network_merge, dtype=dtype, device=device)
    models = replace(models, adapters=networks, adapter_names=[Path(choice.weights).name for choice in choices])
    drawing = GenerateOptions(
        device=device,
        dtype=dtype,
        zero_terminal_snr=options.model.zero_terminal_snr,
        clip_skip=options.model.clip_skip,
        max_token_length=75 * (options.model.max_embeddings_multiples or 1),
    )
    files = FileNames(Path(options.image.outdir), sequential=options.image.sequential_file_name)
    return _draw(planned, options.speed.batch_size, models, drawing, choices, files, Path(options.model.ckpt).name)


def _draw(
    planned: Sequence[PlannedImage],
    batch_size: int,
    models: ImageModels,
    drawing: GenerateOptions,
    choices: Sequence[NetworkChoice],
    files: FileNames,
    model_name: str,
) -> list[Path]:
    encoded: dict[str, Conditioning] = {}
    multipliers: tuple[float, ...] | None = None
    written = []
    for batch in batches(planned, batch_size):
        wanted = _multipliers(batch[0].multipliers, choices)
        if wanted != multipliers:
            for network, multiplier in zip(models.adapters, wanted, strict=False):  # none where they are merged
                network.set_multiplier(multiplier)
            multipliers, encoded = wanted, {}
        with naming_memory("try a smaller one, a smaller --batch_size, or --bf16"):
            images = generate_images(models, [image.settings for image in batch], drawing, encoded)
        network_text = ", ".join(f"{Path(c.weights).name}:{m:g}" for c, m in zip(choices, wanted, strict=True))
        for image, planned_image in zip(images, batch, strict=True):
            path = files.next(planned_image.settings.seed)
            save_png(image, path, planned_image.settings.record(model=model_name, network=network_text))
            written.append(path)
            logger.info("image %d of %d: %s", len(written), len(planned), path)
    return written


# ---- before loading ----


def _read_prompts(options: ImageOptions, architecture: Architecture) -> list[ImagePrompt]:
    multiple = architecture.latent.stride
    given = options.prompts
    if given.from_file is not None:
        prompts = read_image_prompts(Path(given.from_file), size_multiple=multiple)
    else:
        prompts = [parse_image_prompt(given.prompt, size_multiple=multiple)]
    if any(re.search(r"\{[^{}]*\|[^{}]*\}", prompt.prompt) for prompt in prompts):
        logger.warning("prompts with {a|b} are taken as they are: this version has no dynamic prompts")
    return prompts


def _check_multipliers(prompts: Sequence[ImagePrompt], choices: Sequence[NetworkChoice], *, merged: bool) -> None:
    for prompt in prompts:
        if not prompt.multipliers:
            continue
        if merged:
            raise UserError(f'prompt "{prompt.prompt}": --am cannot be used with --network_merge')
        if len(prompt.multipliers) > len(choices):
            raise UserError(
                f'prompt "{prompt.prompt}": --am has {len(prompt.multipliers)} values for {len(choices)} networks'
            )


def _multipliers(own: Sequence[float], choices: Sequence[NetworkChoice]) -> tuple[float, ...]:
    """Return a prompt's own multipliers, and those of the command line for the remaining networks."""
    return (*own, *(choice.multiplier for choice in choices[len(own) :]))


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
        # families' messages use the flags and scripts of training
        text = str(error).replace("--pretrained_model_name_or_path", "--ckpt")
        text = text.replace("use sdxl_train_network.py", "add --sdxl").replace("use train_network.py", "drop --sdxl")
        text = text.replace("use flux_train_network.py", "use flux_minimal_inference.py")
        raise UserError(text) from None


def _show_metadata(choices: Sequence[NetworkChoice]) -> None:
    for choice in choices:
        metadata = read_header(Path(choice.weights)).metadata
        logger.info("metadata of %s: %s", choice.weights, json.dumps(metadata, indent=2, ensure_ascii=False))


def _common_settings(options: ImageOptions, architecture: Architecture, checkpoint: Any) -> ImageSettings:
    native = native_size(Path(checkpoint.path), architecture.modelspec(checkpoint.info)["default_resolution"])
    image = options.image
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
    )


def _repetition(options: ImageOptions) -> Repetition:
    given = options.prompts
    seed = given.seed
    if seed is None:
        seed = random_seed()
        logger.info("seed: %d", seed)
    return Repetition(seed, given.n_iter, given.images_per_prompt, given.iter_same_seed, given.shuffle_prompts)


# ---- loading ----


def _load(
    options: ImageOptions, architecture: Architecture, checkpoint: Any, dtype: torch.dtype, device: torch.device
) -> ImageModels:
    denoiser = architecture.load_denoiser(checkpoint, dtype=dtype, device=str(device))
    architecture.set_attention(denoiser, "xformers" if options.speed.xformers else "torch")
    vae_dtype = torch.float32 if options.model.no_half_vae else dtype
    return ImageModels(
        architecture=architecture,
        tokenizers=architecture.load_tokenizers(checkpoint),
        text_encoders=architecture.load_text_encoders(checkpoint, dtype=dtype, device=str(device)),
        denoiser=denoiser,
        vae=architecture.load_vae(checkpoint, dtype=vae_dtype, device=str(device)),
        v_prediction=checkpoint.info.v_prediction,
    )
