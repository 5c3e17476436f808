"""Complete the settings of a sample prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from library.config.image_settings import OPTIONAL, ImageSettings
from library.inference.prompt_line import SamplePrompt

MAX_RANDOM_SEED = 2**32 - 1


def settings_for(
    prompt: SamplePrompt, defaults: Mapping[str, Any], *, sampler: str, seed: int | None = None
) -> ImageSettings:
    """Complete a sample prompt.

    Args:
        prompt: settings that are ``None`` come from the next ones.
        defaults: the family's ``sample_defaults``: ``width``, ``height``, ``sample_steps``, ``scale``.
        sampler: for prompts that name none.
        seed: for prompts that name none; ``None`` draws one, without touching any random state.
    """
    # the defaults replace every None
    full: Any = prompt.with_defaults(defaults).with_defaults({"sample_sampler": sampler, "seed": seed})
    return ImageSettings(
        prompt=full.prompt,
        negative_prompt=full.negative_prompt or "",
        width=full.width,
        height=full.height,
        steps=full.sample_steps,
        scale=full.scale,
        sampler=full.sample_sampler,
        seed=full.seed if full.seed is not None else random_seed(),
        **{name: getattr(full, name) for name in OPTIONAL if hasattr(full, name)},
    )


def random_seed() -> int:
    """Return a seed from the operating system, without using any generator."""
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED)
