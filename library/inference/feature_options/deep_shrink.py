"""Options of Deep Shrink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from library.config import prompt_options as read
from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option
from library.config.prompt_options import PromptOption


@dataclass(frozen=True)
class DeepShrinkOptions:
    """Deep Shrink: smaller features deep in the U-Net during the first steps of large images."""

    ds_depth_1: int | None = option(
        None, "block before which features are shrunk, from 0; 3 is usual; turns Deep Shrink on", type=int
    )
    ds_timesteps_1: int = option(650, "down to this timestep", type=int)
    ds_depth_2: int | None = option(None, "block before which they are shrunk after that", type=int)
    ds_timesteps_2: int = option(650, "down to this timestep", type=int)
    ds_ratio: float = option(0.5, "share of the features' sides that is left, above 0 to 1", type=float)


#: its options, which are settings of images too
SHRINK_NAMES = tuple(f.name for f in fields(DeepShrinkOptions))
PROMPT_OPTIONS = (
    PromptOption("dsd1", "ds_depth_1", read.whole),
    PromptOption("dst1", "ds_timesteps_1", read.whole),
    PromptOption("dsd2", "ds_depth_2", read.whole),
    PromptOption("dst2", "ds_timesteps_2", read.whole),
    PromptOption("dsr", "ds_ratio", read.ratio),
)


def _ranges(o: Any, facts: Facts) -> Iterator[Finding]:
    given: DeepShrinkOptions = o.deep_shrink
    if not 0 < given.ds_ratio <= 1:
        yield error(f"--ds_ratio {given.ds_ratio:g}: must be above 0, and at most 1")
    for name in ("ds_depth_1", "ds_depth_2"):
        if (depth := getattr(given, name)) is not None and depth < 0:
            yield error(f"--{name} {depth}: must be at least 0")


@idle(*SHRINK_NAMES[1:], reason="without --ds_depth_1")
def _off(o: Any) -> object:
    return o.deep_shrink.ds_depth_1 is None


DECLARATION = Declaration(groups={"deep_shrink": DeepShrinkOptions}, rules=(_ranges,), idle=(_off,))
