"""Learning-rate schedules by their published names, or any class, made by transformers, diffusers and torch."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from library.errors import NoEffect, UserError, did_you_mean
from library.optim.optimizers import OptimizerChoice, parse_keyword_arguments

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScheduleSettings:
    """What the scheduler flags say; warm-up and decay are steps (int) or a share of the run (float, 0 to 1)."""

    name: str = "constant"
    type: str = ""
    args: Sequence[str] | None = None
    warmup: int | float = 0
    decay: int | float = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None


_FLAGS = MappingProxyType(
    {
        "type": "--lr_scheduler_type",
        "args": "--lr_scheduler_args",
        "warmup": "--lr_warmup_steps",
        "decay": "--lr_decay_steps",
        "num_cycles": "--lr_scheduler_num_cycles",
        "power": "--lr_scheduler_power",
        "timescale": "--lr_scheduler_timescale",
        "min_lr_ratio": "--lr_scheduler_min_lr_ratio",
    }
)

#: which settings each published schedule reads
_USES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "constant": (),
        "constant_with_warmup": ("warmup",),
        "linear": ("warmup",),
        "cosine": ("warmup",),
        "cosine_with_restarts": ("warmup", "num_cycles"),
        "polynomial": ("warmup", "power"),
        "inverse_sqrt": ("warmup", "timescale"),
        "cosine_with_min_lr": ("warmup", "num_cycles", "min_lr_ratio"),
        "cosine_warmup_with_min_lr": ("warmup", "num_cycles", "min_lr_ratio"),
        "warmup_stable_decay": ("warmup", "decay", "num_cycles", "min_lr_ratio"),
        "piecewise_constant": ("args",),
    }
)
NAMES = tuple(_USES)


def schedules_that_read(flag: str) -> list[str]:
    """Published schedules that an option (``--lr_warmup_steps``) has an effect on; none for options of another kind."""
    return [name for name, used in _USES.items() if any(_FLAGS[setting] == flag for setting in used)]


_ADAFACTOR = "adafactor:"
#: "factor:until-step,factor:until-step,last factor"
_STEP_RULES = re.compile(r"(?:\s*[\d.eE+-]+\s*:\s*\d+\s*,)*\s*[\d.eE+-]+\s*")
#: what the polynomial schedule ends at
_POLYNOMIAL_END = 1e-7


def steps_of(value: int | float, total_steps: int) -> int:
    """Steps as given, or a share of the run."""
    return int(value * total_steps) if isinstance(value, float) else value


def scheduler_name(choice: OptimizerChoice, settings: ScheduleSettings) -> str:
    """The name for metadata: Adafactor with relative step brings ``adafactor:<lr>``."""
    if choice.uses_relative_step:
        return f"{_ADAFACTOR}{choice.learning_rate}"
    return settings.type or settings.name


def check_scheduler(choice: OptimizerChoice, settings: ScheduleSettings) -> list[NoEffect]:
    """Refuse what cannot work, before a model is loaded; returns warnings of what has no effect.

    Raises:
        UserError: unknown name, missing or useless arguments.
    """
    if choice.uses_relative_step:
        return _check_relative_step(choice, settings)
    if choice.is_schedule_free:
        hint = '; its own warm-up is --optimizer_args "warmup_steps=100"' if settings.warmup else ""
        return _unused(settings, (), f"the schedule-free {choice.name}", with_name=True, hint=hint)
    if settings.type:
        return _check_custom(choice, settings)
    name = settings.name
    _check_name(name)
    if settings.args and name != "piecewise_constant":
        raise UserError(f"--lr_scheduler_args: only for --lr_scheduler_type and piecewise_constant, not for {name}")
    if name == "piecewise_constant":
        _check_step_rules(settings)
    _check_numbers(choice, settings)
    hint = "; use constant_with_warmup" if name == "constant" and settings.warmup else ""
    return _unused(settings, _USES[name], f"--lr_scheduler {name}", hint=hint)


def _check_relative_step(choice: OptimizerChoice, settings: ScheduleSettings) -> list[NoEffect]:
    if settings.warmup:
        raise UserError(
            "--lr_warmup_steps: not with Adafactor's relative_step, which brings its own schedule; give "
            '--optimizer_args "warmup_init=True" instead'
        )
    named = settings.name in (_ADAFACTOR.rstrip(":"), scheduler_name(choice, settings))
    return _unused(settings, (), "Adafactor with relative_step", with_name=not named)


def _check_custom(choice: OptimizerChoice, settings: ScheduleSettings) -> list[NoEffect]:
    """A class of anyone's: make it once over a trial tensor, so that mistakes show before a model is loaded."""
    if settings.warmup:
        raise UserError(f"--lr_scheduler_type {settings.type}: takes no --lr_warmup_steps; remove them")
    schedule = _custom(choice.create([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]), settings)
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
    if name.startswith(_ADAFACTOR):
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


def _check_numbers(choice: OptimizerChoice, settings: ScheduleSettings) -> None:
    used, ratio = _USES[settings.name], settings.min_lr_ratio
    if settings.name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and ratio is None:
        raise UserError(f"--lr_scheduler {settings.name}: needs --lr_scheduler_min_lr_ratio, e.g. 0.1")
    if "min_lr_ratio" in used and ratio is not None and not 0 <= ratio <= 1:
        raise UserError(f"--lr_scheduler_min_lr_ratio {ratio:g}: must lie between 0 and 1")
    if "timescale" in used and settings.timescale is not None and settings.timescale < 1:
        raise UserError(f"--lr_scheduler_timescale {settings.timescale}: must be at least 1 step")
    if "power" in used and settings.power < 0:
        raise UserError(f"--lr_scheduler_power {settings.power:g}: must be at least 0")
    if settings.name == "polynomial" and choice.learning_rate <= _POLYNOMIAL_END:
        raise UserError(
            f"--lr_scheduler polynomial: ends at a rate of {_POLYNOMIAL_END:g}, so --learning_rate must be above it"
        )


def _unused(
    settings: ScheduleSettings, used: Sequence[str], reader: str, *, with_name: bool = False, hint: str = ""
) -> list[NoEffect]:
    """One warning for all given settings that ``reader`` does not read."""
    given = [
        _FLAGS.get(field.name, "--lr_scheduler")
        for field in fields(settings)
        # an empty list of arguments is none
        if (getattr(settings, field.name) or None) != (field.default or None)
        and field.name not in used
        and (with_name or field.name != "name")
    ]
    return [NoEffect(f"{', '.join(given)}: no effect with {reader}{hint}")] if given else []


def create_scheduler(
    optimizer: torch.optim.Optimizer, choice: OptimizerChoice, settings: ScheduleSettings, *, total_steps: int
) -> LRScheduler:
    """Make the schedule of a checked choice; it is stepped once per optimizer step.

    Args:
        optimizer: the bare optimizer.
        total_steps: optimizer steps of the whole run.

    Raises:
        UserError: a class of ``--lr_scheduler_type`` refuses its arguments.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if choice.uses_relative_step:
        return _relative_step(optimizer, choice.learning_rate)
    if choice.is_schedule_free:
        return LambdaLR(optimizer, lambda step: 1.0)
    if settings.type:
        return _custom(optimizer, settings)
    warmup, decay = steps_of(settings.warmup, total_steps), steps_of(settings.decay, total_steps)
    if "warmup" in _USES[settings.name] and warmup > total_steps:
        logger.warning("--lr_warmup_steps %d: the run ends before, after %d steps", warmup, total_steps)
    elif "decay" in _USES[settings.name] and warmup + decay > total_steps:
        logger.warning("--lr_decay_steps %d: the run ends within them, after %d steps", decay, total_steps)
    return _makers(optimizer, settings, total_steps, warmup, decay)[settings.name]()


def _makers(
    optimizer: torch.optim.Optimizer, s: ScheduleSettings, total: int, warmup: int, decay: int
) -> Mapping[str, Callable[[], LRScheduler]]:
    from transformers import optimization as schedules

    ramp = {"optimizer": optimizer, "num_warmup_steps": warmup}
    run = {**ramp, "num_training_steps": total}
    half_cycles = s.num_cycles / 2  # these count whole cosine waves; 0.5 is one fall

    def piecewise() -> LRScheduler:
        from diffusers.optimization import get_piecewise_constant_schedule

        rules = parse_keyword_arguments("--lr_scheduler_args", s.args)["step_rules"]
        return get_piecewise_constant_schedule(optimizer, step_rules=rules)

    return {
        "constant": lambda: schedules.get_constant_schedule(optimizer),
        "constant_with_warmup": lambda: schedules.get_constant_schedule_with_warmup(**ramp),
        "linear": lambda: schedules.get_linear_schedule_with_warmup(**run),
        "cosine": lambda: schedules.get_cosine_schedule_with_warmup(**run),
        "cosine_with_restarts": lambda: schedules.get_cosine_with_hard_restarts_schedule_with_warmup(
            **run, num_cycles=s.num_cycles
        ),
        "polynomial": lambda: schedules.get_polynomial_decay_schedule_with_warmup(
            **ramp,
            # it divides by the steps after the warm-up, of which a run may have none
            num_training_steps=max(total, warmup + 1),
            lr_end=_POLYNOMIAL_END,
            power=s.power,
        ),
        "inverse_sqrt": lambda: schedules.get_inverse_sqrt_schedule(**ramp, timescale=s.timescale),
        "cosine_with_min_lr": lambda: schedules.get_cosine_with_min_lr_schedule_with_warmup(
            **run, num_cycles=half_cycles, min_lr_rate=s.min_lr_ratio
        ),
        "cosine_warmup_with_min_lr": lambda: schedules.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            **run, num_cycles=half_cycles, min_lr_rate=s.min_lr_ratio
        ),
        "warmup_stable_decay": lambda: schedules.get_wsd_schedule(
            **ramp,
            num_decay_steps=decay,
            num_stable_steps=max(0, total - warmup - decay),
            num_cycles=half_cycles,
            min_lr_ratio=s.min_lr_ratio or 0.0,
        ),
        "piecewise_constant": piecewise,
    }


def _relative_step(optimizer: Any, initial_lr: float) -> LRScheduler:
    """Reports the rates that Adafactor makes itself; ``initial_lr`` before its first step."""
    from transformers.optimization import AdafactorSchedule

    class RelativeStepSchedule(AdafactorSchedule):
        def get_lr(self) -> list[float]:
            # the parent leaves out groups without a gradient, which module dropout may make, and fails after a
            # step that the gradient scaler skipped
            states = [self.optimizer.state.get(group["params"][0]) for group in self.optimizer.param_groups]
            return [
                float(self.optimizer._get_lr(group, state)) if state else initial
                for group, state, initial in zip(self.optimizer.param_groups, states, self.base_lrs, strict=True)
            ]

    return RelativeStepSchedule(optimizer, initial_lr)


def _custom(optimizer: torch.optim.Optimizer, settings: ScheduleSettings) -> LRScheduler:
    kind = _custom_class(settings.type)
    given = parse_keyword_arguments("--lr_scheduler_args", settings.args)
    try:
        return kind(optimizer, **given)
    except Exception as error:  # anyone's class: whatever it raises is about what it was given
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--lr_scheduler_type {settings.type}: {text}; see --lr_scheduler_args") from error


def _custom_class(path: str) -> type[LRScheduler]:
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or "torch.optim.lr_scheduler"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise UserError(f"--lr_scheduler_type {path}: the module {error.name} is not installed") from None
        raise UserError(f"--lr_scheduler_type {path}: importing {module_name} failed: {error}") from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        raise UserError(
            f"--lr_scheduler_type {path}: {module_name} has no {class_name}{did_you_mean(class_name, dir(module))}"
        )
    return kind
