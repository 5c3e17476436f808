"""Options of Gradual Latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from library.config import prompt_options as read
from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option
from library.config.prompt_options import PromptOption

#: the start, where a prompt gives another option of it alone
START = 650
#: samplers whose steps are written here
SAMPLERS = ("euler_a", "k_euler_a")


@dataclass(frozen=True)
class GradualLatentOptions:
    """Gradual Latent: small latents that grow from step to step; with the sampler euler_a."""

    gradual_latent_timesteps: int | None = option(
        None, "timestep below which latents grow, such as 750; turns Gradual Latent on", type=int
    )
    gradual_latent_ratio: float = option(0.5, "sides of the first latents as a share of the last, above 0", type=float)
    gradual_latent_ratio_step: float = option(0.125, "by how much the share grows", type=float)
    gradual_latent_every_n_steps: int = option(
        3, "steps between two growths", type=int, aliases=("--gradual_latent_ratio_every_n_steps",)
    )
    gradual_latent_s_noise: float = option(1.0, "factor of the noise of steps in which latents grow", type=float)
    gradual_latent_unsharp_params: str | None = option(
        None, "sharpen what has grown: size,sigma,strength,target, such as 3,0.5,0.5,1; target 1 sharpens behind the "
        "step, 0 before it"
    )  # fmt: skip


def read_unsharp(text: str) -> tuple[float, ...]:
    """Return (odd size in cells, sigma, strength, target).

    Raises:
        ValueError: something else.
    """
    values = [read.number(part.strip()) for part in text.split(",")]
    values += [1.0] * (len(values) == 3)
    if len(values) != 4 or values[0] != int(values[0]) or values[0] < 1 or not int(values[0]) % 2 or values[1] <= 0:
        raise ValueError("an odd size, a sigma above 0, a strength and 0 or 1 are needed, such as 3,0.5,0.5,1")
    return tuple(values)


PROMPT_OPTIONS = (
    PromptOption("glt", "gradual_latent_timesteps", read.whole),
    PromptOption("glr", "gradual_latent_ratio", read.ratio),
    PromptOption("gls", "gradual_latent_ratio_step", read.ratio),
    PromptOption("gle", "gradual_latent_every_n_steps", read.whole),
    PromptOption("glsn", "gradual_latent_s_noise", read.number),
    PromptOption("glus", "gradual_latent_unsharp_params", read_unsharp),
)


def _cannot_work(options: Any, facts: Facts) -> Iterator[Finding]:
    given: GradualLatentOptions = options.gradual_latent
    for name in ("gradual_latent_ratio", "gradual_latent_ratio_step"):
        if not 0 < getattr(given, name) <= 1:
            yield error(f"--{name} {getattr(given, name):g}: must be above 0, and at most 1")
    if given.gradual_latent_every_n_steps < 1:
        yield error(f"--gradual_latent_every_n_steps {given.gradual_latent_every_n_steps}: must be at least 1")
    if given.gradual_latent_unsharp_params is not None:
        try:
            read_unsharp(given.gradual_latent_unsharp_params)
        except ValueError as wrong:
            yield error(f"--gradual_latent_unsharp_params {given.gradual_latent_unsharp_params}: {wrong}")
    if given.gradual_latent_timesteps is not None:
        if options.image.sampler not in SAMPLERS:
            yield error(
                f"--gradual_latent_timesteps: works with --sampler euler_a alone, not with {options.image.sampler}"
            )
        if options.image.image_path and options.image.mask_path:
            yield error(
                "--gradual_latent_timesteps with a mask: the kept part has no smaller latents; give one of them"
            )


@idle(
    *(f.name for f in fields(GradualLatentOptions)),
    reason="without --gradual_latent_timesteps, or --glt in a prompt",
)
def _off(options: Any) -> object:
    return options.gradual_latent.gradual_latent_timesteps is None


DECLARATION = Declaration(groups={"gradual_latent": GradualLatentOptions}, rules=(_cannot_work,), idle=(_off,))
