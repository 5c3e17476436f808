"""The strengths of networks: of the command line, of prompts and of grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from library.errors import UserError
from library.inference.grid import Axis, read_axes
from library.inference.networks import NetworkChoice
from library.inference.options import ImageOptions
from library.inference.prompt_line import ImagePrompt


def axes_of(options: ImageOptions, choices: Sequence[NetworkChoice]) -> list[Axis]:
    """Return the axes of ``--grid``. Raises UserError: a mistake in one."""
    files = [Path(choice.weights) for choice in choices[merged_count(options, choices) :]]
    started = bool(options.image.image_path) or options.highres.highres_fix_scale is not None
    return read_axes(options.prompts.grid or [], files, started=started)


def merged_count(options: ImageOptions, choices: Sequence[NetworkChoice]) -> int:
    """Return how many of the networks are merged, the first ones."""
    if options.networks.network_merge_n_models is not None:
        return min(options.networks.network_merge_n_models, len(choices))
    return len(choices) if options.networks.network_merge else 0


def check_multipliers(prompts: Sequence[ImagePrompt], choices: Sequence[NetworkChoice], merged: int) -> None:
    """Refuse strengths within prompts that fit no network.

    Args:
        merged: how many of the networks are merged, the first ones.
    """
    for prompt in prompts:
        if not prompt.multipliers:
            continue
        if merged and merged == len(choices):
            raise UserError(f'prompt "{prompt.prompt}": --am cannot be used with --network_merge')
        if len(prompt.multipliers) > len(choices) - merged:
            count = len(choices) - merged
            raise UserError(f'prompt "{prompt.prompt}": --am has {len(prompt.multipliers)} values for {count} networks')


def multipliers_of(own: Sequence[float], choices: Sequence[NetworkChoice], merged: int) -> tuple[float, ...]:
    """Return the strengths of all networks: the command line's, or the prompt's own of the first that are applied."""
    given = [choice.multiplier for choice in choices]
    return (*given[:merged], *own, *given[merged + len(own) :])
