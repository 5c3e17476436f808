"""Prompts with their settings in lines such as ``a cat --n blurry --w 512 --d 1``; files of them: ``prompt_file.py``.

A line's first part is always the prompt. An option begins at a ``--`` that follows
white space (or begins the line) and is followed by a letter; its name ends at the next white space and must
be one of the table's, in upper or lower case. A last duplicate wins. This module does not import torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from library.architectures.registry import FOLDERS, declaration
from library.config import prompt_options as read
from library.config.prompt_options import DDPM_FIELDS, PromptOption
from library.errors import UserError, did_you_mean
from library.inference.dynamic_prompts import enumerates, expanded, is_dynamic

logger = logging.getLogger(__name__)

MIN_SIZE = 64  # pixels
MAX_SIZE = 16_384  # pixels; more would not fit into memory, and checking the request alone would take minutes
MAX_STEPS = 1000

_OPTION_START = re.compile(r"(?:^|\s+)--(?=[A-Za-z])")


@dataclass(frozen=True)
class Prompt:
    """The settings that every prompt may have; ``None`` leaves one to the command line or the family."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    sample_steps: int | None = None
    scale: float | None = None  # classifier-free guidance
    guidance_scale: float | None = None  # embedded (distilled) guidance
    #: values of options that are declared elsewhere, by their fields
    own: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def value(self, name: str) -> Any:
        """Return the value of an option's field; ``None`` if it is not given."""
        return getattr(self, name, None) if name in _names(type(self)) else self.own.get(name)

    def given(self) -> dict[str, Any]:
        """Return what it sets of an image, by the names of ``ImageSettings`` and of its own options."""
        known = {name: self.value(name) for name in _OF_IMAGES}
        return named_as_settings({name: value for name, value in known.items() if value is not None}) | dict(self.own)


#: fields of prompts that are settings of each of their images
_OF_IMAGES = (
    *("negative_prompt", "width", "height", "sample_steps", "scale", "guidance_scale"),
    *("seed", "sample_sampler"),  # of sample prompts
)


def named_as_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names of ``ImageSettings``, instead of those of prompts."""
    return {name.removeprefix("sample_"): value for name, value in values.items()}


def _names(kind: type[Prompt]) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind))


@dataclass(frozen=True)
class SamplePrompt(Prompt):
    """One sample image of training, by the keys of prompt files."""

    seed: int | None = None  # None: another one each time
    sample_sampler: str | None = None
    controlnet_image: str | None = None


@dataclass(frozen=True)
class ImagePrompt(Prompt):
    """One prompt line of an inference script, which may stand for several images."""

    seeds: tuple[int, ...] = ()  # of the prompt's images, in order
    multipliers: tuple[float, ...] = ()  # of the additional networks, in order
    file_name: str | None = None  # of the first image
    template: PromptTemplate | None = None  # of a line with choices


@dataclass(frozen=True)
class PromptTemplate:
    """A line that stands for others, see ``library.inference.dynamic_prompts``."""

    line: str
    read: Callable[[str], ImagePrompt]

    @property
    def enumerates(self) -> bool:
        """Whether there is one image for each choice, however many are asked for."""
        return enumerates(self.line)

    def prompts(self, seed: int) -> list[ImagePrompt]:
        """Return the prompts of an image with this seed; several only if it enumerates."""
        return [self.read(line) for line in expanded(self.line, seed)]


#: options of the sample prompts of training
TRAINING_OPTIONS = (
    PromptOption("w", "width", read.whole),
    PromptOption("h", "height", read.whole),
    PromptOption("d", "seed", read.seed),
    PromptOption("s", "sample_steps", read.whole),
    PromptOption("l", "scale", read.number),
    PromptOption("g", "guidance_scale", read.number),
    PromptOption("n", "negative_prompt", read.text),
    PromptOption("ss", "sample_sampler", read.sampler),
    PromptOption("cn", "controlnet_image", read.path),
)


def family_options() -> tuple[PromptOption, ...]:
    """Return the options that families declare for the prompts of their images."""
    found = (option for folder in FOLDERS for option in declaration(folder).prompt_options)
    return tuple({option.field: option for option in found}.values())


#: options of the prompts of gen_img.py
IMAGE_OPTIONS = (
    PromptOption("w", "width", read.whole),
    PromptOption("h", "height", read.whole),
    PromptOption("s", "sample_steps", read.whole),
    PromptOption("d", "seeds", read.list_of(read.seed)),
    PromptOption("l", "scale", read.number),
    PromptOption("n", "negative_prompt", read.text),
    PromptOption("am", "multipliers", read.list_of(read.number)),
    PromptOption("f", "file_name", read.name_below),
    PromptOption("t", "strength", read.share),
    PromptOption("nl", "negative_scale", read.number_or_none),
    PromptOption("ow", "original_width", read.whole),
    PromptOption("oh", "original_height", read.whole),
    PromptOption("nw", "original_width_negative", read.whole),
    PromptOption("nh", "original_height_negative", read.whole),
    PromptOption("ct", "crop_top", read.whole),
    PromptOption("cl", "crop_left", read.whole),
)

#: options of the lines that minimal inference scripts read; published ones count by their first letter alone
MINIMAL_OPTIONS = (
    PromptOption("w", "width", read.whole, "width"),
    PromptOption("h", "height", read.whole, "height"),
    PromptOption("s", "sample_steps", read.whole, "steps"),
    PromptOption("d", "seeds", lambda value: (read.seed(value),)),
    PromptOption("g", "guidance_scale", read.number_from_zero, "guidance"),
    PromptOption("m", "multipliers", read.list_of(read.number), "multipliers"),
    PromptOption("n", "negative_prompt", read.text_or_dash, "negative_prompt"),
    PromptOption("c", "scale", read.number, "cfg_scale"),
)
#: words that begin with the letter of another option
REFUSED_MINIMAL_OPTIONS: Mapping[str, str] = {"seed": "write --d for the seed, --s for the steps"}


def parse_prompt_line(
    line: str,
    defaults: SamplePrompt | None = None,
    *,
    where: str = "prompt",
    size_multiple: int = 8,
    used: Collection[str] = DDPM_FIELDS,
    own: Sequence[PromptOption] = (),
) -> SamplePrompt:
    """Read one training sample prompt.

    Args:
        line: the prompt and its options.
        defaults: settings of options that the line does not name.
        where: the name of the line in messages, e.g. ``prompts.txt:3``.
        size_multiple: widths and heights are rounded down to multiples of this many pixels.
        used: names of the settings that the family uses; others cause a warning and are ignored.
        own: further options, which the family declares.

    Raises:
        UserError: unknown option or bad value.
    """
    return SampleReader(size_multiple, used, own).line(line, where, defaults)


def parse_image_prompt(
    line: str, *, where: str = "--prompt", size_multiple: int = 8, options: Sequence[PromptOption] = ()
) -> ImagePrompt:
    """Read one prompt of ``gen_img.py``; arguments and errors as those of ``parse_prompt_line``.

    Args:
        options: further ones, of features.

    With choices in braces the result is one of those that the line stands for, and ``template`` the line itself.
    """
    if is_dynamic(line):
        parse = partial(parse_image_prompt, where=where, size_multiple=size_multiple, options=options)
        return replace(parse(expanded(line, 0)[0]), template=PromptTemplate(line, parse))
    table = (*IMAGE_OPTIONS, *options)
    prompt, values = _parse(line, table, {}, where)
    return ImagePrompt(prompt, **_by_field(_within_limits(values, where, size_multiple), ImagePrompt))


def parse_minimal_prompt(line: str, *, where: str, size_step: int, options: Sequence[PromptOption] = ()) -> ImagePrompt:
    """Read one line of a minimal inference script with ``--interactive``.

    Args:
        options: further ones, of the family.

    Raises:
        UserError: unknown option, bad value, a side that is no multiple of ``size_step`` pixels.
    """
    table = (*MINIMAL_OPTIONS, *options)
    prompt, values = _parse(line, table, REFUSED_MINIMAL_OPTIONS, where)
    for name in ("width", "height"):
        if name in values:
            check_size(values[name], f"{where}: {name}", size_step)
    if not 1 <= values.get("sample_steps", 1) <= MAX_STEPS:
        raise UserError(f"{where}: steps {values['sample_steps']}: must be 1 to {MAX_STEPS}")
    return ImagePrompt(prompt, **_by_field(values, ImagePrompt))


def _by_field(values: Mapping[str, Any], kind: type[Prompt]) -> dict[str, Any]:
    """Return values by the fields of a class of prompts, those that it has no field for as ``own``."""
    known = {name: value for name, value in values.items() if name in _names(kind)}
    return {**known, "own": {name: value for name, value in values.items() if name not in known}}


def without_idle_settings(
    prompts: Sequence[SamplePrompt], idle: Mapping[str, str], *, scale: float
) -> tuple[SamplePrompt, ...]:
    """Return sample prompts as the model uses them; a setting without effect is named once, for all prompts.

    Args:
        idle: settings that this model does not use, with the reason, completing "--g has no effect ..."; they are left
            out. A 0, which turns a setting off, causes no warning.
        scale: of classifier-free guidance, where a prompt gives none.
    """
    for name, why in idle.items():
        if count := sum(bool(prompt.value(name)) for prompt in prompts):
            letter = next(o.name for o in (*TRAINING_OPTIONS, *family_options()) if o.field == name)
            logger.warning("--%s of %s has no effect %s", letter, _counted(count), why)
    unguided = [p for p in prompts if p.negative_prompt and (scale if p.scale is None else p.scale) == 1.0]
    if unguided:
        logger.warning("--n of %s has no effect at a guidance scale of 1; add --l 4, say", _counted(len(unguided)))
    known = _names(SamplePrompt)
    left_out: dict[str, Any] = dict.fromkeys(name for name in idle if name in known)
    return tuple(
        replace(prompt, **left_out, own={name: value for name, value in prompt.own.items() if name not in idle})
        for prompt in prompts
    )


def _counted(count: int) -> str:
    return "a sample prompt" if count == 1 else f"{count} sample prompts"


# ---- lines ----


def _parse(
    line: str, options: Sequence[PromptOption], refused: Mapping[str, str], where: str
) -> tuple[str, dict[str, Any]]:
    named = {option.name: option for option in options}
    written_out = {o.long[:end]: o for o in options for end in range(1, len(o.long) + 1)}
    table = {**written_out, **named}
    prompt, *segments = _OPTION_START.split(line.strip())
    values: dict[str, Any] = {}
    for segment in segments:
        word, *rest = segment.split(None, 1)
        name, text = word.lower(), rest[0].strip() if rest else ""
        if name in refused and name not in table:
            raise UserError(f"{where}: --{name}: {refused[name]}")
        if name not in table:
            raise UserError(
                f"{where}: unknown option --{word}{did_you_mean(name, table)}; "
                f"options are {', '.join('--' + option for option in named)}"
            )
        try:
            values[table[name].field] = table[name].read(text)
        except ValueError as error:
            raise UserError(f"{where}: --{name} {text}".rstrip() + f": {error}") from None
    return prompt.strip(), values


class SampleReader:
    """Reads the sample prompts of training; arguments as those of ``parse_prompt_line``."""

    def __init__(self, size_multiple: int, used: Collection[str], own: Sequence[PromptOption]) -> None:
        self._size_multiple = size_multiple
        self._used = {*used, *(option.field for option in own)}
        # one file may serve several families, so the options of others are known
        self.options = tuple({o.field: o for o in (*family_options(), *own, *TRAINING_OPTIONS)}.values())

    def line(self, line: str, where: str, defaults: SamplePrompt | None = None) -> SamplePrompt:
        """Read a line."""
        prompt, values = _parse(line, self.options, {}, where)
        return self.prompt(prompt, values, where, defaults)

    def prompt(self, prompt: str, values: Mapping[str, Any], where: str, defaults: SamplePrompt | None) -> SamplePrompt:
        """Return a prompt with these values within their limits; those that the family does not use cause a warning."""
        for name in values:
            if name not in self._used:
                option = next(o.name for o in self.options if o.field == name)
                logger.warning("%s: %s (--%s) has no effect with this model", where, name, option)
        used = {name: value for name, value in values.items() if name in self._used}
        base = defaults if defaults is not None else SamplePrompt("")
        known = _by_field(_within_limits(used, where, self._size_multiple), SamplePrompt)
        return replace(base, **{**known, "prompt": prompt, "own": {**base.own, **known["own"]}})


# ---- limits ----


def _within_limits(values: Mapping[str, Any], where: str, size_multiple: int) -> dict[str, Any]:
    limited = dict(values)
    for name in ("width", "height"):
        if name in limited:
            limited[name] = usable_size(limited[name], f"{where}: {name}", size_multiple)
    steps = limited.get("sample_steps")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        limited["sample_steps"] = min(max(steps, 1), MAX_STEPS)
        logger.warning("%s: steps %d are out of range, %d are used", where, steps, limited["sample_steps"])
    return limited


def check_size(pixels: int, what: str, size_step: int) -> None:
    """Raise UserError if a side is not a multiple of ``size_step`` pixels, too small or too large."""
    _refuse_huge(pixels, what)
    if pixels < MIN_SIZE:
        raise UserError(f"{what} {pixels}: must be at least {MIN_SIZE} pixels")
    if below := pixels % size_step:
        lower = pixels - below
        raise UserError(f"{what} {pixels}: must be a multiple of {size_step}, such as {lower} or {lower + size_step}")


def usable_size(pixels: int, what: str, size_multiple: int) -> int:
    """Round a side down to a multiple of ``size_multiple`` pixels, at least 64, and warn if that changed it.

    Raises:
        UserError: it is larger than the largest image.
    """
    _refuse_huge(pixels, what)
    usable = max(pixels // size_multiple * size_multiple, MIN_SIZE)
    if usable != pixels:
        limits = f"multiples of {size_multiple}, at least {MIN_SIZE}"
        logger.warning("%s %d is not usable, %d is used (%s)", what, pixels, usable, limits)
    return usable


def _refuse_huge(pixels: int, what: str) -> None:
    if pixels > MAX_SIZE:
        raise UserError(f"{what} {pixels}: must be at most {MAX_SIZE} pixels")
