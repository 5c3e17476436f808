"""Run ``sd3_minimal_inference.py``: the table of Stable Diffusion 3's parts and settings for ``minimal.py``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from library.architectures.sd3 import SD3
from library.architectures.sd3.options import SD3Options
from library.config.arguments import ConsoleOptions
from library.config.console import setup_console
from library.diffusion.objective import FLOW_SAMPLERS
from library.errors import UserError
from library.inference.messages import for_images
from library.inference.minimal import MinimalModel, ModelPart, generate_for
from library.inference.minimal_options import SIZE_STEP
from library.inference.part_dtypes import read_part_dtypes
from library.inference.prompt_line import parse_flux_prompt
from library.inference.sd3_options import SD3ImageOptions, SD3InferenceOptions
from library.inference.settings import ImageSettings

logger = logging.getLogger(__name__)

PARTS = ("clip_l", "clip_g", "t5xxl", "sd3", "vae")


def generate_images(options: SD3InferenceOptions, lines: TextIO | None = None) -> list[Path]:
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
    return generate_for(open_model(options), options, SD3ImageOptions.prompt, lines or sys.stdin)


def open_model(options: SD3InferenceOptions) -> MinimalModel:
    """Find the model's files and settings.

    Raises:
        UserError: files that are missing, or are of other models.
    """
    given, image = options.files, options.image
    family = SD3.changed(
        SD3Options,
        clip_l=given.clip_l,
        clip_g=given.clip_g,
        t5xxl=given.t5xxl,
        t5xxl_max_token_length=given.t5xxl_token_length,
        apply_lg_attn_mask=given.apply_lg_attn_mask,
        apply_t5_attn_mask=given.apply_t5_attn_mask,
    )
    try:
        checkpoint = family.inspect(given.ckpt_path or "", vae=given.vae, tokenizer_cache_dir=given.tokenizer_cache_dir)
    except UserError as error:
        text = for_images(str(error), "--ckpt_path")
        raise UserError(text.replace("with --network_weights", "with --lora_weights")) from None
    dtypes = read_part_dtypes(options.precision.dtype, dict.fromkeys(PARTS), without_fp8=("vae",), example="sd3")
    parts = {name: ModelPart(name, dtype) for name, dtype in dtypes.items()}
    common = ImageSettings(
        prompt="",
        negative_prompt=image.negative_prompt,
        width=image.width,
        height=image.height,
        steps=image.steps,
        scale=image.cfg_scale,
        sampler=FLOW_SAMPLERS[0],
        seed=0,
    )
    return MinimalModel(
        family=family.for_model(checkpoint),
        checkpoint=checkpoint,
        common=common,
        encoders=[parts[name] for name in PARTS[: len(checkpoint.text_encoders)]],
        denoiser=parts["sd3"],
        vae=parts["vae"],
        takes_guidance=False,
        read_prompt=lambda line, where: parse_flux_prompt(line, where=where, size_step=SIZE_STEP),
    )
