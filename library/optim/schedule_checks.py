"""Refuse learning-rate schedules that cannot work, and name settings that they do not read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import fields

import torch

from library.errors import NoEffect, UserError, did_you_mean
from library.optim.optimizers import OptimizerChoice, parse_keyword_arguments
from library.optim.schedulers import (
    ADAFACTOR,
    FLAGS,
    NAMES,
    POLYNOMIAL_END,
    USES,
    ScheduleSettings,
    create_scheduler,
    custom_schedule,
    maker_of,
    scheduler_name,
)
from library.optim.trial import is_schedule_free

#: "factor:until-step,factor:until-step,last factor"
_STEP_RULES = re.compile(r"(?:\s*[\d.eE+-]+\s*:\s*\d+\s*,)*\s*[\d.eE+-]+\s*")

#: arguments that a run decides, with their options
_DECIDED = {
    "num_warmup_steps": "--lr_warmup_steps",
    "num_decay_steps": "--lr_decay_steps",
    "num_training_steps": "--max_train_steps",
    "num_stable_steps": "--lr_decay_steps",
}
#: arguments of a named schedule that have their own option
_SAME = {
    "num_cycles": "num_cycles",
    "power": "power",
    "timescale": "timescale",
    "min_lr_rate": "min_lr_ratio",
    "min_lr_ratio": "min_lr_ratio",
    "min_lr": "min_lr_ratio",
}
#: steps of the trial schedule
_TRIAL_STEPS = 1000


def check_scheduler(choice: OptimizerChoice, settings: ScheduleSettings) -> list[NoEffect]:
    """Refuse schedules that cannot work, before a model is loaded; returns warnings of settings without effect.

    Raises:
        UserError: unknown name, missing or useless arguments.
    """
    if choice.uses_relative_step:
        return _check_relative_step(choice, settings)
    if is_schedule_free(choice):
        hint = '; its own warm-up is --optimizer_args "warmup_steps=100"' if settings.warmup else ""
        return _unused(settings, (), f"the schedule-free {choice.name}", with_name=True, hint=hint)
    if settings.type:
        return _checkcustom_schedule(choice, settings)
    name = settings.name
    _check_name(name)
    if name == "piecewise_constant":
        _check_step_rules(settings)
    _check_numbers(choice, settings)
    if name != "piecewise_constant":
        _check_arguments(choice, settings)
    hint = "; use constant_with_warmup" if name == "constant" and settings.warmup else ""
    return _unused(settings, (*USES[name], "args"), f"--lr_scheduler {name}", hint=hint)


def _check_relative_step(choice: OptimizerChoice, settings: ScheduleSettings) -> list[NoEffect]:
    hint = '; --optimizer_args "warmup_init=True" warms up instead' if settings.warmup else ""
    named = settings.name in (ADAFACTOR.rstrip(":"), scheduler_name(choice, settings))
    return _unused(settings, (), "Adafactor with relative_step", with_name=not named, hint=hint)


def _checkcustom_schedule(choice: OptimizerChoice, settings: ScheduleSettings) -> list[NoEffect]:
    """A class of anyone's: make it once over a trial tensor, so that mistakes show before a model is loaded."""
    schedule = custom_schedule(choice.create([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]), settings)
    needed = [
        parameter.name
        for parameter in inspect.signature(schedule.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        raise UserError(
            f"--lr_scheduler_type {settings.type}: its steps need {', '.join(needed)}, which a run does not give"
        )
    return _unused(settings, ("type", "args"), f"--lr_scheduler_type {settings.type}", with_name=True)


def _check_name(name: str) -> None:
    if name.startswith(ADAFACTOR):
        raise UserError(f"--lr_scheduler {name}: only for --optimizer_type Adafactor with relative_step=True")
    if name == "reduce_lr_on_plateau":
        raise UserError(
            "--lr_scheduler reduce_lr_on_plateau: it needs a loss to watch, which a run does not give it; "
            "use cosine or warmup_stable_decay"
        )
    if name not in NAMES:
        raise UserError(
            f"--lr_scheduler {name}: no such schedule{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}"
        )


def _check_step_rules(settings: ScheduleSettings) -> None:
    given = parse_keyword_arguments("--lr_scheduler_args", settings.args)
    rules = given.pop("step_rules", None)
    if not isinstance(rules, str) or not _STEP_RULES.fullmatch(rules):
        raise UserError(
            "--lr_scheduler piecewise_constant: needs --lr_scheduler_args \"step_rules='1:100,0.1:200,0.01'\" "
            "(factor:until-step, ..., last factor)"
        )
    for name in given:
        raise UserError(f"--lr_scheduler_args {name}: piecewise_constant takes step_rules alone")


def _check_arguments(choice: OptimizerChoice, settings: ScheduleSettings) -> None:
    """Check the arguments that transformers' function of a named schedule takes; it is made once, for their values."""
    given = parse_keyword_arguments("--lr_scheduler_args", settings.args)
    if not given:
        return
    parameters = inspect.signature(maker_of(settings.name)).parameters
    names = [n for n in parameters if n not in ("optimizer", "last_epoch") and n not in _DECIDED]
    for name in given:
        if name in _DECIDED:
            raise UserError(f"--lr_scheduler_args {name}: give it as {_DECIDED[name]}")
        if name not in names:
            takes = f"it takes {', '.join(names)}" if names else "it takes none"
            raise UserError(
                f"--lr_scheduler_args {name}: --lr_scheduler {settings.name} has no such argument"
                f"{did_you_mean(name, names)}; {takes}"
            )
        setting = _SAME.get(name)
        if setting and getattr(settings, setting) != getattr(ScheduleSettings, setting):
            raise UserError(f"--lr_scheduler_args {name}: {FLAGS[setting]} is given too, which is the same; remove one")
    optimizer = choice.create([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    try:
        create_scheduler(optimizer, choice, settings, total_steps=_TRIAL_STEPS)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"--lr_scheduler_args: {' '.join(str(error).split())}") from error


def _check_numbers(choice: OptimizerChoice, settings: ScheduleSettings) -> None:
    used, ratio = USES[settings.name], settings.min_lr_ratio
    given = parse_keyword_arguments("--lr_scheduler_args", settings.args)
    lowest = ratio is not None or "min_lr" in given or "min_lr_rate" in given
    if settings.name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not lowest:
        raise UserError(f"--lr_scheduler {settings.name}: needs --lr_scheduler_min_lr_ratio, e.g. 0.1")
    if "min_lr_ratio" in used and ratio is not None and not 0 <= ratio <= 1:
        raise UserError(f"--lr_scheduler_min_lr_ratio {ratio:g}: must be between 0 and 1")
    if "timescale" in used and settings.timescale is not None and settings.timescale < 1:
        raise UserError(f"--lr_scheduler_timescale {settings.timescale}: must be at least 1 step")
    if "power" in used and settings.power < 0:
        raise UserError(f"--lr_scheduler_power {settings.power:g}: must be at least 0")
    if settings.name == "polynomial" and choice.learning_rate <= given.get("lr_end", POLYNOMIAL_END):
        raise UserError(
            f"--lr_scheduler polynomial: ends at a rate of {given.get('lr_end', POLYNOMIAL_END):g}, so "
            "--learning_rate must be above it"
        )


def _unused(
    settings: ScheduleSettings, used: Sequence[str], reader: str, *, with_name: bool = False, hint: str = ""
) -> list[NoEffect]:
    """Return one warning for all given settings that ``reader`` does not read."""
    given = [
        FLAGS.get(field.name, "--lr_scheduler")
        for field in fields(settings)
        # an empty list of arguments counts as not given
        if (getattr(settings, field.name) or None) != (field.default or None)
        and field.name not in used
        and (with_name or field.name != "name")
    ]
    return [NoEffect(f"{', '.join(given)}: no effect with {reader}{hint}")] if given else []
