"""Schedules at their landmarks, what they need, and exact resume."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.optim.optimizers import resolve_optimizer
from library.optim.schedulers import NAMES, ScheduleSettings, check_scheduler, create_scheduler, scheduler_name, steps_of

ADAMW = resolve_optimizer("AdamW", False, False, None, 1.0)
ADAFACTOR = resolve_optimizer("Adafactor", False, False, None, 1e-3)


def rates(settings: ScheduleSettings, total: int = 100) -> list[float]:
    """The rate at each step of a run; the base rate is 1."""
    check_scheduler(ADAMW, settings)
    optimizer = ADAMW.create([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    schedule = create_scheduler(optimizer, ADAMW, settings, total_steps=total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("settings", "landmarks"),
    [
        ({"name": "constant"}, {0: 1.0, 99: 1.0}),
        ({"name": "constant_with_warmup", "warmup": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ({"name": "constant_with_warmup", "warmup": 0.1}, {5: 0.5, 10: 1.0}),
        # linear from 1 at step 20 to 0 at step 100: halfway at 60
        ({"name": "linear", "warmup": 20}, {10: 0.5, 20: 1.0, 60: 0.5}),
        ({"name": "cosine"}, {0: 1.0, 50: 0.5}),
        ({"name": "cosine", "warmup": 20}, {10: 0.5, 20: 1.0, 60: 0.5}),
        ({"name": "cosine_with_restarts", "num_cycles": 2}, {0: 1.0, 25: 0.5, 50: 1.0, 75: 0.5}),
        ({"name": "polynomial", "power": 2.0}, {0: 1.0, 50: 0.25}),
        ({"name": "inverse_sqrt", "warmup": 10, "timescale": 10}, {5: 0.5, 10: 1.0, 40: 0.5}),
        ({"name": "cosine_with_min_lr", "min_lr_ratio": 0.2}, {0: 1.0, 50: 0.6}),
        ({"name": "cosine_warmup_with_min_lr", "min_lr_ratio": 0.2, "warmup": 10}, {10: 1.0, 55: 0.6}),
        ({"name": "warmup_stable_decay", "warmup": 10, "decay": 20}, {5: 0.5, 10: 1.0, 79: 1.0, 90: 0.5}),
        ({"name": "piecewise_constant", "args": ["step_rules='1:10,0.1:20,0.01'"]}, {0: 1.0, 15: 0.1, 30: 0.01}),
        ({"type": "CosineAnnealingLR", "args": ["T_max=100"]}, {0: 1.0, 50: 0.5}),
        ({"type": "torch.optim.lr_scheduler.StepLR", "args": ["step_size=10", "gamma=0.5"]}, {5: 1.0, 15: 0.5}),
    ],
)
def test_landmarks(settings: dict, landmarks: dict[int, float]) -> None:
    found = rates(ScheduleSettings(**settings))
    for step, rate in landmarks.items():
        assert found[step] == pytest.approx(rate, abs=0.02), step


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cosin"}, 'did you mean "cosine"'),
        ({"name": "constant", "warmup": 10}, "constant_with_warmup"),
        ({"name": "piecewise_constant"}, "step_rules"),
        ({"name": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"name": "cosine_warmup_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"name": "reduce_lr_on_plateau"}, "use cosine"),
        ({"name": "adafactor:0.001"}, "Adafactor"),
        ({"name": "cosine", "args": ["a=1"]}, "--lr_scheduler_args"),
        ({"type": "NoSuchLR"}, "NoSuchLR"),
        ({"type": "nopackage.LR"}, "nopackage is not installed"),
        ({"type": "StepLR", "warmup": 3}, "--lr_warmup_steps"),
    ],
)
def test_mistakes(settings: dict, words: str) -> None:
    with pytest.raises(UserError) as found:
        check_scheduler(ADAMW, ScheduleSettings(**settings))
    assert words in str(found.value)


def test_settings_without_effect_are_warned_of() -> None:
    assert "--lr_decay_steps" in check_scheduler(ADAMW, ScheduleSettings(name="cosine", decay=10))[0]
    assert check_scheduler(ADAFACTOR, ScheduleSettings(name="cosine"))
    assert check_scheduler(ADAFACTOR, ScheduleSettings()) == []


def test_adafactor_brings_its_own() -> None:
    assert scheduler_name(ADAFACTOR, ScheduleSettings()) == "adafactor:0.001"
    optimizer = ADAFACTOR.create([{"params": [torch.nn.Parameter(torch.ones(3, 3))]}])
    schedule = create_scheduler(optimizer, ADAFACTOR, ScheduleSettings(), total_steps=10)
    assert type(schedule).__name__ == "AdafactorSchedule"


@pytest.mark.parametrize("value", [(10, 100, 10), (0.1, 100, 10), (1.0, 100, 100), (0, 100, 0)])
def test_steps_or_share(value: tuple[float, int, int]) -> None:
    given, total, steps = value
    assert steps_of(given, total) == steps


@pytest.mark.parametrize("name", [n for n in NAMES if n != "piecewise_constant"])
def test_a_restored_schedule_goes_on_exactly(name: str) -> None:
    settings = ScheduleSettings(name=name, warmup=0 if name == "constant" else 3, decay=0, min_lr_ratio=0.1)

    def make():
        optimizer = ADAMW.create([{"params": [torch.nn.Parameter(torch.ones(1))]}])
        return optimizer, create_scheduler(optimizer, ADAMW, settings, total_steps=20)

    optimizer, schedule = make()
    for _ in range(7):
        optimizer.step()
        schedule.step()
    other, restored = make()
    other.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(schedule.state_dict())
    for _ in range(10):
        for o, s in ((optimizer, schedule), (other, restored)):
            o.step()
            s.step()
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
