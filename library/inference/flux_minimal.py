"""Run ``flux_minimal_inference.py``: the table of FLUX.1's and Chroma's parts and settings for ``minimal.py``."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TextIO

from library.architectures.flux import FLUX, Flux
from library.architectures.flux.inspection import FluxCheckpoint
from library.architectures.flux.options import FluxModelOptions
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.diffusion.objective import FLOW_SAMPLERS
from library.errors import UserError
from library.inference.flux_options import SIZE_STEP, FluxImageOptions, FluxInferenceOptions, part_dtypes
from library.inference.messages import for_images
from library.inference.minimal import MinimalModel, ModelPart, generate_for
from library.inference.prompt_line import parse_flux_prompt
from library.inference.settings import ImageSettings

logger = logging.getLogger(__name__)


def draw_images(options: FluxInferenceOptions, lines: TextIO | None = None) -> list[Path]:
    """Generate the prompt of the command line, or with ``--interactive`` prompts from the keyboard.

    Args:
        options: accepted by ``check_options``.
        lines: source of prompts; default is the keyboard.

    Returns:
        the files, in the order they were written.

    Raises:
        UserError: wrong or missing files; errors of typed prompts are printed, and the next prompt is read.
    """
    setup_console(ConsoleOptions())
    if not options.image.interactive and re.search(r"\s--[a-z]", options.image.prompt):
        logger.warning("--prompt is taken as it is; options within a prompt are read with --interactive only")
    return generate_for(open_model(options), options, FluxImageOptions.prompt, lines or sys.stdin)


def open_model(options: FluxInferenceOptions) -> MinimalModel:
    """Find the model's files and settings.

    Raises:
        UserError: files that are missing, or are of other models.
    """
    checkpoint, family = _inspect(options)
    parts = {name: ModelPart(name, dtype) for name, dtype in part_dtypes(options.precision).items()}
    return MinimalModel(
        family=family,
        checkpoint=checkpoint,
        common=_common_settings(options, family, checkpoint.info.description),
        encoders=[parts[name] for name in ("clip_l", "t5xxl")[-len(checkpoint.text_encoders) :]],
        denoiser=parts["flux"],
        vae=parts["ae"],
        takes_guidance=family.takes_guidance,
        read_prompt=lambda line, where: parse_flux_prompt(line, where=where, size_step=SIZE_STEP),
    )


def _inspect(options: FluxInferenceOptions) -> tuple[FluxCheckpoint, Flux]:
    given = options.files
    family = FLUX.changed(
        FluxModelOptions,
        model_type=given.model_type,
        clip_l=given.clip_l,
        t5xxl=given.t5xxl,
        ae=given.ae,
        apply_t5_attn_mask=given.apply_t5_attn_mask,
    )
    try:
        checkpoint = family.inspect(given.ckpt_path or "", tokenizer_cache_dir=given.tokenizer_cache_dir)
    except UserError as error:
        text = for_images(str(error), "--ckpt_path")
        raise UserError(text.replace("with --network_weights", "with --lora_weights")) from None
    if len(checkpoint.text_encoders) == 1:
        for name, value in (("clip_l", given.clip_l), ("clip_l_dtype", options.precision.clip_l_dtype)):
            if value:
                logger.warning("--%s has no effect with %s", name, checkpoint.info.description)
    family = family.for_model(checkpoint)
    # the command line's guidance comes with each image, if the model takes one
    return checkpoint, family.changed(
        FluxModelOptions, guidance_scale=family.sample_defaults.get("guidance_scale", 0.0)
    )


def _common_settings(options: FluxInferenceOptions, family: Flux, model: str) -> ImageSettings:
    image = options.image
    if not family.takes_guidance and image.guidance not in (FluxImageOptions.guidance, 0.0):
        logger.warning("--guidance %g has no effect with %s", image.guidance, model)
    return ImageSettings(
        prompt="",
        negative_prompt=image.negative_prompt or "",
        width=image.width,
        height=image.height,
        steps=family.drawing_steps if image.steps is None else image.steps,
        scale=image.cfg_scale,
        sampler=FLOW_SAMPLERS[0],
        seed=0,
        guidance_scale=image.guidance if family.takes_guidance else None,
    )
