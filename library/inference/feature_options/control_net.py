"""Options of ControlNet and ControlNet-LLLite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from library.config.declaration import Declaration, Facts, Finding, error, idle
from library.config.fields import option

#: thresholds of canny where none are given
CANNY = (63, 191)


@dataclass(frozen=True)
class ControlOptions:
    """ControlNet and ControlNet-LLLite."""

    control_net_models: list[str] | None = option(
        None, "ControlNet files or Diffusers folders; several take turns (SD) or are averaged (SDXL)", nargs="*"
    )
    control_net_lllite_models: list[str] | None = option(
        None, "ControlNet-LLLite files, for SDXL; several act together", nargs="*"
    )
    guide_image_path: list[str] | None = option(
        None, "images that ControlNets, or CLIP-image or VGG16 guidance, read; files or folders", nargs="*"
    )
    control_net_preps: list[str] | None = option(
        None, "preparation of each ControlNet's images: none, canny, or canny_63_191 with thresholds", nargs="*"
    )
    control_net_multipliers: list[float] | None = option(
        None, "strength of each ControlNet or LLLite, 1 if not given", type=float, nargs="*",
        aliases=("--control_net_weights",),
    )  # fmt: skip
    control_net_ratios: list[float] | None = option(
        None, "share of the steps, from the first, in which each acts; 1 if not given", type=float, nargs="*"
    )
    highres_fix_disable_control_net: bool = option(False, "do not use them in the second stage of the highres fix")


def read_preparation(text: str) -> tuple[int, int] | None:
    """Return the thresholds of canny; None for images that are used as they are.

    Raises:
        ValueError: another word.
    """
    if text == "none":
        return None
    found = re.fullmatch(r"canny(?:_(\d+)(?:_(\d+))?)?", text)
    if not found:
        raise ValueError(f'no such preparation "{text}"; there are none, canny and canny_<low>_<high>')
    low, high = (int(given) if given else usual for given, usual in zip(found.groups(), CANNY, strict=True))
    return low, high


def _cannot_work(options: Any, facts: Facts) -> Iterator[Finding]:
    given: ControlOptions = options.control
    nets, lllites = given.control_net_models or [], given.control_net_lllite_models or []
    if nets and lllites:
        yield error("--control_net_models and --control_net_lllite_models were both given; give one of them")
    models = nets or lllites
    if models and not given.guide_image_path:
        yield error("--control_net_models: there is no image to read; give --guide_image_path")
    counted: dict[str, Sequence[object] | None] = {
        "control_net_preps": given.control_net_preps,
        "control_net_multipliers": given.control_net_multipliers,
        "control_net_ratios": given.control_net_ratios,
    }
    for name, values in counted.items():
        if len(values or []) > len(models):
            yield error(f"--{name}: {len(values or [])} values for {len(models)} ControlNets")
    for text in given.control_net_preps or []:
        try:
            read_preparation(text)
        except ValueError as wrong:
            yield error(f"--control_net_preps: {wrong}")
    for value in given.control_net_multipliers or []:
        if not abs(value) < float("inf"):
            yield error(f"--control_net_multipliers {value}: must be a finite number")
    for ratio in given.control_net_ratios or []:
        if not 0 <= ratio <= 1:
            yield error(f"--control_net_ratios {ratio:g}: must be 0 to 1")


@idle("highres_fix_disable_control_net", reason="without --highres_fix_scale")
def _one_stage(options: Any) -> object:
    return options.highres.highres_fix_scale is None


@idle("highres_fix_disable_control_net", reason="without a ControlNet")
def _no_models(options: Any) -> object:
    given: ControlOptions = options.control
    models = given.control_net_models or given.control_net_lllite_models
    return options.highres.highres_fix_scale is not None and not models


DECLARATION = Declaration(groups={"control": ControlOptions}, rules=(_cannot_work,), idle=(_one_stage, _no_models))
