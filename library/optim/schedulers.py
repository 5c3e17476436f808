"""Learning-rate schedules by their published names, or any class, made by transformers, diffusers and torch."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError, did_you_mean
from library.optim.optimizers import OptimizerChoice, parse_keyword_arguments
from library.optim.trial import is_schedule_free

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScheduleSettings:
    """The scheduler flags; warm-up and decay are steps (int) or a fraction of the run (float, 0 to 1)."""

    name: str = "constant"
    type: str = ""
    args: Sequence[str] | None = None
    warmup: int | float = 0
    decay: int | float = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None


FLAGS = MappingProxyType(
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

#: settings that each published schedule reads
USES: Mapping[str, tuple[str, ...]] = MappingProxyType(
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
NAMES = tuple(USES)


def schedules_that_read(flag: str) -> list[str]:
    """Return the published schedules that read an option (``--lr_warmup_steps``); empty for other options."""
    return [name for name, used in USES.items() if any(FLAGS[setting] == flag for setting in used)]


ADAFACTOR = "adafactor:"
#: end of the polynomial schedule
POLYNOMIAL_END = 1e-7


def steps_of(value: int | float, total_steps: int) -> int:
    """Return steps as given, or of a fraction of the run."""
    return int(value * total_steps) if isinstance(value, float) else value


def scheduler_name(choice: OptimizerChoice, settings: ScheduleSettings) -> str:
    """Return the name for metadata: Adafactor with relative step has ``adafactor:<lr>``."""
    if choice.uses_relative_step:
        return f"{ADAFACTOR}{choice.learning_rate}"
    return settings.type or settings.name


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
    if is_schedule_free(choice):
        return LambdaLR(optimizer, lambda step: 1.0)
    if settings.type:
        return custom_schedule(optimizer, settings)
    warmup, decay = steps_of(settings.warmup, total_steps), steps_of(settings.decay, total_steps)
    if "warmup" in USES[settings.name] and warmup > total_steps:
        logger.warning("--lr_warmup_steps %d: the run ends before, after %d steps", warmup, total_steps)
    elif "decay" in USES[settings.name] and warmup + decay > total_steps:
        logger.warning("--lr_decay_steps %d: the run ends within them, after %d steps", decay, total_steps)
    return maker_of(settings.name)(optimizer, **_arguments(settings, total_steps, warmup, decay))


def follow_learning_rates(schedule: LRScheduler, rates: Sequence[float | None]) -> None:
    """Set these base learning rates after a state has loaded others.

    Raises:
        UserError: the schedule does not allow it.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if type(schedule) is not LambdaLR:
        if list(rates) != list(schedule.base_lrs):
            raise UserError(
                "--resume: the learning rate cannot be changed with --lr_scheduler_type, whose schedule continues from "
                "its own state; give the learning rates of that run"
            )
        return
    schedule.base_lrs = list(rates)
    groups = schedule.optimizer.param_groups
    for group, rate, factor in zip(groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = rate
        group["lr"] = rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]


def maker_of(name: str) -> Callable[..., LRScheduler]:
    """Return the function that makes a published schedule."""
    from transformers import optimization as schedules

    if name == "piecewise_constant":
        from diffusers.optimization import get_piecewise_constant_schedule

        return get_piecewise_constant_schedule
    return {
        "constant": schedules.get_constant_schedule,
        "constant_with_warmup": schedules.get_constant_schedule_with_warmup,
        "linear": schedules.get_linear_schedule_with_warmup,
        "cosine": schedules.get_cosine_schedule_with_warmup,
        "cosine_with_restarts": schedules.get_cosine_with_hard_restarts_schedule_with_warmup,
        "polynomial": schedules.get_polynomial_decay_schedule_with_warmup,
        "inverse_sqrt": schedules.get_inverse_sqrt_schedule,
        "cosine_with_min_lr": schedules.get_cosine_with_min_lr_schedule_with_warmup,
        "cosine_warmup_with_min_lr": schedules.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
        "warmup_stable_decay": schedules.get_wsd_schedule,
    }[name]


def _arguments(s: ScheduleSettings, total: int, warmup: int, decay: int) -> dict[str, Any]:
    """Return the arguments of a published schedule: from the options, and from ``--lr_scheduler_args``, which win."""
    ramp = {"num_warmup_steps": warmup}
    run = {**ramp, "num_training_steps": total}
    half_cycles = s.num_cycles / 2  # these count whole cosine waves; 0.5 is one fall
    lowest = {"num_cycles": half_cycles, "min_lr_rate": s.min_lr_ratio}
    by_name: Mapping[str, dict[str, Any]] = {
        "constant": {},
        "constant_with_warmup": ramp,
        "linear": run,
        "cosine": run,
        "cosine_with_restarts": {**run, "num_cycles": s.num_cycles},
        # it divides by the steps after the warm-up, which may be 0
        "polynomial": {
            **ramp,
            "num_training_steps": max(total, warmup + 1),
            "lr_end": POLYNOMIAL_END,
            "power": s.power,
        },
        "inverse_sqrt": {**ramp, "timescale": s.timescale},
        "cosine_with_min_lr": {**run, **lowest},
        "cosine_warmup_with_min_lr": {**run, **lowest},
        "warmup_stable_decay": {
            **ramp,
            "num_decay_steps": decay,
            "num_stable_steps": max(0, total - warmup - decay),
            "num_cycles": half_cycles,
            "min_lr_ratio": s.min_lr_ratio or 0.0,
        },
        "piecewise_constant": {},
    }
    return {**by_name[s.name], **parse_keyword_arguments("--lr_scheduler_args", s.args)}


def _relative_step(optimizer: Any, initial_lr: float) -> LRScheduler:
    """Reports the learning rates that Adafactor computes itself; ``initial_lr`` before its first step."""
    from transformers.optimization import AdafactorSchedule

    class RelativeStepSchedule(AdafactorSchedule):
        def get_lr(self) -> list[float]:
            # the parent skips groups without a gradient, which module dropout may cause, and fails after a step that
            # the gradient scaler skipped
            states = [self.optimizer.state.get(group["params"][0]) for group in self.optimizer.param_groups]
            return [
                float(self.optimizer._get_lr(group, state)) if state else initial
                for group, state, initial in zip(self.optimizer.param_groups, states, self.base_lrs, strict=True)
            ]

    return RelativeStepSchedule(optimizer, initial_lr)


def custom_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSettings) -> LRScheduler:
    kind = _custom_class(settings.type)
    given = parse_keyword_arguments("--lr_scheduler_args", settings.args)
    try:
        return kind(optimizer, **given)
    except Exception as error:  # a third-party class: any error is about its arguments
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
