"""Options that the minimal inference scripts of several families have, and what makes them wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.fields import option
from library.errors import UserError
from library.inference.prompt_line import MAX_SEED, MAX_STEPS, check_size

#: sides of images are multiples of this many pixels
SIZE_STEP = 16


@dataclass(frozen=True)
class LoraWeightsOptions:
    """LoRA."""

    lora_weights: list[str] | tuple[str, ...] = option(
        (), "LoRA or OFT files, each with its strength after a semicolon: 'file;0.8'", nargs="*", aliases=("--lora",)
    )
    merge_lora_weights: bool = option(
        False, "merge them into the model first: faster, but strengths cannot be changed by --m"
    )


def check_common(image: Any, networks: LoraWeightsOptions) -> Iterator[str]:
    """Return what is wrong with sizes, steps, seeds, scales, folders and LoRA files, one line each.

    Args:
        image: a group of options with ``width``, ``height``, ``steps``, ``seed``, ``cfg_scale`` and ``output_dir``.
    """
    for name in ("width", "height"):
        try:
            check_size(getattr(image, name), f"--{name}", SIZE_STEP)
        except UserError as error:
            yield str(error)
    if image.steps is not None and not 1 <= image.steps <= MAX_STEPS:
        yield f"--steps {image.steps}: must be 1 to {MAX_STEPS}"
    if image.seed is not None and not 0 <= image.seed <= MAX_SEED:
        yield f"--seed {image.seed}: must be 0 to {MAX_SEED}"
    if not abs(image.cfg_scale) < float("inf"):
        yield f"--cfg_scale {image.cfg_scale:g}: must be a finite number"
    if Path(image.output_dir).exists() and not Path(image.output_dir).is_dir():
        yield f"--output_dir {image.output_dir}: is a file; give a folder"
    if networks.merge_lora_weights and not networks.lora_weights:
        yield "--merge_lora_weights: there is nothing to merge; give --lora_weights"
