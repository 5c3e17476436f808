"""Run ``gen_img.py``: read prompts, load, apply networks, generate, save."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from library.architectures.base import Architecture
from library.architectures.common.checkpoint import INPAINTING_CHANNELS, accepting_inpainting
from library.architectures.common.latent_diffusion import LatentDiffusion
from library.config.console import setup_console
from library.config.image_settings import ImageSettings
from library.errors import UserError
from library.files.safetensors_io import read_header
from library.inference.denoise import CHANNELS
from library.inference.failures import naming_memory
from library.inference.feature_options.control_net import ControlOptions
from library.inference.feature_options.deep_shrink import DeepShrinkOptions
from library.inference.features import prompt_options
from library.inference.interactive import generate_lines
from library.inference.loading import embeddings, layered_embeddings
from library.inference.messages import for_images
from library.inference.native_size import native_size
from library.inference.networks import NetworkChoice, choose_networks
from library.inference.options import SIZE_NAMES, ImageOptions, idle_options
from library.inference.plan import plan_images
from library.inference.prompt_file import read_image_prompts
from library.inference.prompt_line import ImagePrompt, parse_image_prompt, usable_size
from library.inference.prompt_module import read_module
from library.inference.session import FEATURES, Session, repetition
from library.inference.sources import Sources, find_sources, prompts_of_images
from library.inference.strengths import axes_of, check_multipliers, merged_count
from library.inference.textual_inversion import check_width, read_layered_vectors, read_vectors

DEPTHS = ("ds_depth_1", "ds_depth_2")
MEMORY_REMEDY = "try a smaller one, a smaller --batch_size, or --bf16"

logger = logging.getLogger(__name__)


def generate_all(options: ImageOptions, architecture: Architecture, lines: TextIO | None = None) -> list[Path]:
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
    if isinstance(architecture, LatentDiffusion):
        architecture = architecture.with_emphasis(options.model.emb_normalize_mode)
    prompts = _read_prompts(options, architecture)
    choices = choose_networks(
        options.networks.network_module,
        options.networks.network_weights,
        options.networks.network_mul,
        options.networks.network_args,
    )
    merged = merged_count(options, choices)
    axes_of(options, choices)  # its mistakes are found before anything is loaded
    check_multipliers(prompts, choices, merged)
    checkpoint = _inspect(options, architecture)
    logger.info("model: %s, %s", checkpoint.path, checkpoint.info.description)
    _check_embeddings(options, architecture, checkpoint)
    _check_depths(options, architecture, checkpoint, prompts)
    for path in layered_embeddings(options):
        read_layered_vectors(path)
    if options.networks.network_show_meta:
        _show_metadata(choices)
    common = _common_settings(options, architecture, checkpoint)
    _warn_of_sizes(architecture, common, prompts)
    for feature in FEATURES:
        feature.check(options, architecture, checkpoint)
    sources = Sources.of(options.image, options.of(ControlOptions), networks=len(choices) - merged)
    planned = sources.assigned(plan_images(prompts, common, repetition(options))) if prompts else []
    module = None if options.prompts.from_module is None else read_module(Path(options.prompts.from_module))
    session = Session(options, architecture, checkpoint, common, sources, choices)
    if options.prompts.interactive:
        return generate_lines(session, lines or sys.stdin, MEMORY_REMEDY)
    with naming_memory(MEMORY_REMEDY):
        return session.generate_planned(planned) if module is None else session.generate_module(module)


# ---- before loading ----


def _read_prompts(options: ImageOptions, architecture: Architecture) -> list[ImagePrompt]:
    multiple = architecture.latent.stride
    given = options.prompts
    if given.interactive or given.from_module is not None:
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


def _inspect(options: ImageOptions, architecture: Architecture) -> Any:
    model = options.model
    try:
        with accepting_inpainting():
            return architecture.inspect(
                model.ckpt or "",
                v2=model.v2,
                v_parameterization=model.v_parameterization,
                vae=model.vae,
                tokenizer_cache_dir=model.tokenizer_cache_dir,
            )
    except UserError as error:
        text = for_images(str(error), "--ckpt")
        text = text.replace("use gen_img.py --sdxl", "add --sdxl").replace("use gen_img.py", "drop --sdxl")
        raise UserError(text) from None


def _is_inpainting(checkpoint: Any) -> bool:
    return checkpoint.unet.config.get("in_channels") == INPAINTING_CHANNELS


def _check_embeddings(options: ImageOptions, architecture: Architecture, checkpoint: Any) -> None:
    """Refuse embedding files whose vectors have other widths than the text encoders'."""
    count = len(architecture.text_encoder_targets)
    for path in embeddings(options):
        vectors = read_vectors(path, count)
        for index, found in enumerate(vectors):
            encoder = architecture.load_text_encoder(checkpoint, index, dtype=torch.float32, device="meta")
            check_width(f"--textual_inversion_embeddings {path}", found, encoder)


def _check_depths(
    options: ImageOptions, architecture: Architecture, checkpoint: Any, prompts: Sequence[ImagePrompt]
) -> None:
    """Refuse depths of Deep Shrink that the model does not have."""
    shrink = options.of(DeepShrinkOptions)
    given = [(name, getattr(shrink, name), f"--{name}") for name in DEPTHS]
    given += [
        (name, prompt.own.get(name), f'prompt "{prompt.prompt}": {name}') for prompt in prompts for name in DEPTHS
    ]
    wanted = [(depth, where) for _, depth, where in given if depth is not None]
    if wanted:
        denoiser = architecture.load_denoiser(checkpoint, dtype=torch.float32, device="meta")
        count = len(architecture.shrink_points(denoiser))
        for depth, where in wanted:
            if depth >= count:
                raise UserError(f"{where} {depth}: Deep Shrink: this model has depths 0 to {count - 1}")


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
        negative_scale=image.negative_scale,
        strength=image.strength,
        **{name: getattr(image, name) for name in SIZE_NAMES},
        own={
            **{name: value for feature in FEATURES for name, value in feature.given(options).items()},
            **({CHANNELS: INPAINTING_CHANNELS} if _is_inpainting(checkpoint) else {}),
        },
    )
