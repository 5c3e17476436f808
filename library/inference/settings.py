"""Complete the settings of a sample prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from library.config.image_settings import ImageSettings
from library.inference.prompt_line import SamplePrompt, named_as_settings

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
    usual = ImageSettings(
        prompt=prompt.prompt,
        negative_prompt="",
        width=0,
        height=0,
        steps=0,
        scale=1.0,
        sampler=sampler,
        seed=random_seed() if seed is None else seed,
    )
    return usual.changed(named_as_settings(defaults)).changed(prompt.given())


def random_seed() -> int:
    """Return a seed from the operating system, without using any generator."""
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED)
