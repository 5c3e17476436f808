"""Learning-rate schedules by their published names, or any class, made by transformers, diffusers and torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import UserError, did_you_mean
from library.optim.optimizers import OptimizerChoice, parse_keyword_arguments

#: the names that take warm-up steps
WITH_WARMUP = (
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
NAMES = ("constant", *WITH_WARMUP, "piecewise_constant")

_ADAFACTOR = "adafactor:"


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


def steps_of(value: int | float, total_steps: int) -> int:
    """Steps as given, or a share of the run."""
    return int(value * total_steps) if isinstance(value, float) else value


def scheduler_name(choice: OptimizerChoice, settings: ScheduleSettings) -> str:
    """The name for metadata: Adafactor with relative step brings ``adafactor:<lr>``."""
    if choice.uses_relative_step:
        return f"{_ADAFACTOR}{choice.learning_rate}"
    return settings.type or settings.name


def check_scheduler(choice: OptimizerChoice, settings: ScheduleSettings) -> list[str]:
    """Refuse what cannot work; returns warnings.

    Raises:
        UserError: unknown name, missing or useless arguments.
    """
    custom = parse_keyword_arguments("--lr_scheduler_args", settings.args)
    if choice.uses_relative_step or choice.is_schedule_free:
        if settings.type or settings.name != "constant" or settings.warmup:
            return [f"{choice.name} brings its own schedule: --lr_scheduler and --lr_warmup_steps have no effect"]
        return []
    if settings.type:
        if settings.warmup:
            raise UserError(f"--lr_scheduler_type {settings.type}: takes no --lr_warmup_steps; remove them")
        _custom_class(settings.type)
        return []
    name = settings.name
    if name.startswith(_ADAFACTOR):
        raise UserError(f"--lr_scheduler {name}: only for --optimizer_type Adafactor with relative_step=True")
    if name == "reduce_lr_on_plateau":
        raise UserError(
            "--lr_scheduler reduce_lr_on_plateau: it needs a loss to watch, which a run does not give it; "
            "use cosine or warmup_stable_decay"
        )
    if name not in NAMES:
        raise UserError(f"--lr_scheduler {name}: no such schedule{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}")
    if settings.warmup and name not in WITH_WARMUP:
        with_it = "; use constant_with_warmup" if name == "constant" else ""
        raise UserError(f"--lr_scheduler {name}: takes no --lr_warmup_steps{with_it}")
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and settings.min_lr_ratio is None:
        raise UserError(f"--lr_scheduler {name}: needs --lr_scheduler_min_lr_ratio, e.g. 0.1")
    if name == "piecewise_constant" and "step_rules" not in custom:
        raise UserError(
            "--lr_scheduler piecewise_constant: needs --lr_scheduler_args \"step_rules='1:100,0.1:200,0.01'\" "
            "(factor:until-step, ..., last factor)"
        )
    if name != "piecewise_constant" and custom:
        raise UserError("--lr_scheduler_args: only for --lr_scheduler_type and piecewise_constant")
    if settings.decay and name != "warmup_stable_decay":
        return [f"--lr_decay_steps has no effect with --lr_scheduler {name}; warmup_stable_decay uses it"]
    return []


def create_scheduler(optimizer: Any, choice: OptimizerChoice, settings: ScheduleSettings, *, total_steps: int) -> Any:
    """Make the schedule of a checked choice; it is stepped once per optimizer step.

    Args:
        optimizer: the bare optimizer.
        total_steps: optimizer steps of the whole run.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if choice.uses_relative_step:
        from transformers.optimization import AdafactorSchedule

        return AdafactorSchedule(optimizer, choice.learning_rate)
    if choice.is_schedule_free:
        return LambdaLR(optimizer, lambda step: 1.0)
    if settings.type:
        given = parse_keyword_arguments("--lr_scheduler_args", settings.args)
        try:
            return _custom_class(settings.type)(optimizer, **given)
        except (TypeError, ValueError) as error:
            raise UserError(f"--lr_scheduler_type {settings.type}: {error}; see --lr_scheduler_args") from None
    return _makers(optimizer, settings, total_steps)[settings.name]()


def _makers(optimizer: Any, s: ScheduleSettings, total: int) -> Mapping[str, Callable[[], Any]]:
    from transformers import optimization as schedules

    warmup = steps_of(s.warmup, total)
    ramp = {"optimizer": optimizer, "num_warmup_steps": warmup}
    run = {**ramp, "num_training_steps": total}
    half_cycles = s.num_cycles / 2  # these count whole cosine waves; 0.5 is one fall
    decay = steps_of(s.decay, total)

    def piecewise() -> Any:
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
        "polynomial": lambda: schedules.get_polynomial_decay_schedule_with_warmup(**run, power=s.power),
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


def _custom_class(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or "torch.optim.lr_scheduler"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"--lr_scheduler_type {path}: the module {error.name} is not installed") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(
            f"--lr_scheduler_type {path}: {module_name} has no {class_name}{did_you_mean(class_name, dir(module))}"
        )
    return found
