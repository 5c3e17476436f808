"""Options within a prompt, such as ``a cat --w 512``: their names, and the readers of their values.

A model family or a feature of generating images declares its own; ``library/inference/prompt_line.py`` reads the lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from library.diffusion.samplers import SAMPLER_NAMES
from library.errors import did_you_mean

#: what a text is for: a caption of training, or the prompt or the negative prompt of an image
TextRole = Literal["caption", "prompt", "negative"]

MAX_SEED = 2**63 - 1

#: settings of a sample prompt that families with a DDPM schedule (SD 1.x, 2.x, SDXL) use
DDPM_FIELDS = frozenset(
    ("prompt", "negative_prompt", "width", "height", "seed", "sample_steps", "scale", "sample_sampler")
)


@dataclass(frozen=True)
class PromptOption:
    """``--name value`` in a prompt line: the field of the value and its parser.

    It is all that a new option needs: a field that the prompt's class does not have is kept in ``Prompt.own``, and in
    ``ImageSettings.own`` of the image, where those who declare the option read it and PNG files record it.
    """

    name: str
    field: str
    read: Callable[[str], Any]  # raises ValueError that says what is expected
    long: str = ""  # an alternative word, which may be abbreviated


def text(value: str) -> str:
    return value


def text_or_dash(value: str) -> str:
    """Read a text; a dash is the empty one."""
    return "" if value == "-" else value


def path(value: str) -> str:
    if not value:
        raise ValueError("a file is needed")
    return value


def name_below(value: str) -> str:
    """Read the name of a file within the folder for images."""
    found = PurePath(path(value))
    if found.is_absolute() or ".." in found.parts or found.anchor:
        raise ValueError("a name below --outdir is needed")
    return value


def whole(value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value):
        raise ValueError("a whole number, 0 or more, is needed")
    return int(value)


def seed(value: str) -> int:
    number = whole(value)
    if number > MAX_SEED:
        raise ValueError(f"a seed is at most {MAX_SEED}")
    return number


def number(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        raise ValueError("a number is needed") from None
    if not math.isfinite(found):
        raise ValueError("a finite number is needed")
    return found


def number_or_none(value: str) -> float | None:
    return None if value.lower() == "none" else number(value)


def number_from_zero(value: str) -> float:
    found = number(value)
    if found < 0:
        raise ValueError("must be at least 0")
    return found


def number_above_zero(value: str) -> float:
    found = number(value)
    if found <= 0:
        raise ValueError("must be above 0")
    return found


def share(value: str) -> float:
    found = number(value)
    if not 0 <= found <= 1:
        raise ValueError("a number from 0 to 1 is needed")
    return found


def ratio(value: str) -> float:
    found = number(value)
    if not 0 < found <= 1:
        raise ValueError("a number above 0, and at most 1, is needed")
    return found


def sampler(value: str) -> str:
    if value not in SAMPLER_NAMES:
        raise ValueError(f"no such sampler{did_you_mean(value, SAMPLER_NAMES)}; there are {', '.join(SAMPLER_NAMES)}")
    return value


def list_of(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a reader of values between commas."""
    return lambda value: tuple(read(part.strip()) for part in value.split(","))
