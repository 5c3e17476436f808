"""All that defines one image, besides the models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.inference.prompt_line import SamplePrompt

MAX_RANDOM_SEED = 2**32 - 1


@dataclass(frozen=True)
class ImageSettings:
    """Everything that defines one image, besides the models."""

    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int  # pixels
    steps: int
    scale: float  # classifier-free guidance; 1: none
    sampler: str
    seed: int
    # for families that know them; None: the family's own
    guidance_scale: float | None = None  # embedded guidance
    flow_shift: float | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None

    def record(self, *, model: str, network: str = "") -> dict[str, str]:
        """Return text for ``save_png``; ``model`` and ``network`` are names for people."""
        record = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": str(self.seed),
            "steps": str(self.steps),
            "scale": f"{self.scale:g}",
            "sampler": self.sampler,
            "size": f"{self.width}x{self.height}",
            "model": model,
        }
        own = ("guidance_scale", "flow_shift", "cfg_trunc_ratio", "renorm_cfg")
        record |= {name: f"{getattr(self, name):g}" for name in own if getattr(self, name) is not None}
        return {**record, "network": network} if network else record

    def texts(self) -> tuple[str, ...]:
        """Return the texts to encode."""
        return (self.prompt,) if self.scale == 1.0 else (self.prompt, self.negative_prompt)

    def drawn_with(self, other: ImageSettings) -> bool:
        """Whether both images may share a batch: everything but text and seed is equal."""
        return replace(self, prompt="", negative_prompt="", seed=0) == replace(
            other, prompt="", negative_prompt="", seed=0
        )


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
    full = prompt.with_defaults(defaults).with_defaults({"sample_sampler": sampler, "seed": seed})
    return ImageSettings(
        prompt=full.prompt,
        negative_prompt=full.negative_prompt or "",
        width=full.width,
        height=full.height,
        steps=full.sample_steps,
        scale=full.scale,
        sampler=full.sample_sampler,
        seed=full.seed if full.seed is not None else random_seed(),
        guidance_scale=full.guidance_scale,
        flow_shift=full.flow_shift,
        cfg_trunc_ratio=full.cfg_trunc_ratio,
        renorm_cfg=full.renorm_cfg,
    )


def random_seed() -> int:
    """Return a seed from the operating system, without using any generator."""
    return random.SystemRandom().randint(0, MAX_RANDOM_SEED)
