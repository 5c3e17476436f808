"""Schedules at their landmarks, what they need, and exact resume."""

from __future__ import annotations

import pytest
import torch

from library.errors import NoEffect, UserError
from library.optim.optimizers import resolve_optimizer
from library.optim.schedule_checks import check_scheduler
from library.optim.schedulers import (
    NAMES,
    ScheduleSettings,
    create_scheduler,
    scheduler_name,
    steps_of,
)

# some tests step schedules alone, as they are stepped after an optimizer step that was skipped
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

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
        # a warm-up as long as the run
        ({"name": "polynomial", "warmup": 100}, {0: 0.0, 50: 0.5, 99: 0.99}),
        ({"name": "linear", "warmup": 1.0}, {0: 0.0, 50: 0.5, 99: 0.99}),
        ({"name": "inverse_sqrt", "warmup": 10, "timescale": 10}, {5: 0.5, 10: 1.0, 40: 0.5}),
        ({"name": "cosine_with_min_lr", "min_lr_ratio": 0.2}, {0: 1.0, 50: 0.6}),
        ({"name": "cosine_warmup_with_min_lr", "min_lr_ratio": 0.2, "warmup": 10}, {10: 1.0, 55: 0.6}),
        ({"name": "warmup_stable_decay", "warmup": 10, "decay": 20}, {5: 0.5, 10: 1.0, 79: 1.0, 90: 0.5}),
        ({"name": "warmup_stable_decay", "decay": 0.2, "min_lr_ratio": 0.5}, {0: 1.0, 80: 1.0, 90: 0.75, 99: 0.5}),
        ({"name": "piecewise_constant", "args": ["step_rules='1:10,0.1:20,0.01'"]}, {0: 1.0, 15: 0.1, 30: 0.01}),
        # cosine waves: half of one is the usual fall, and three halves end at 0 too
        ({"name": "cosine", "args": ["num_cycles=1.5"]}, {0: 1.0, 100 // 3: 0.0, 200 // 3: 1.0}),
        ({"name": "polynomial", "args": ["lr_end=0.25", "power=1.0"]}, {0: 1.0, 50: 0.625, 99: 0.25}),
        ({"name": "cosine_with_min_lr", "args": ["min_lr=0.5"]}, {0: 1.0, 50: 0.75, 99: 0.5}),
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
        ({"name": "piecewise_constant"}, "step_rules"),
        ({"name": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"name": "cosine_warmup_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"name": "reduce_lr_on_plateau"}, "use cosine"),
        ({"name": "adafactor:0.001"}, "Adafactor"),
        ({"name": "cosine", "args": ["a=1"]}, "--lr_scheduler_args a: --lr_scheduler cosine has no such argument"),
        ({"name": "cosine", "args": ["num_cycle=1"]}, 'did you mean "num_cycles"'),
        ({"name": "constant", "args": ["power=1"]}, "it takes none"),
        ({"name": "cosine", "args": ["num_warmup_steps=1"]}, "give it as --lr_warmup_steps"),
        ({"name": "polynomial", "args": ["power=2"], "power": 3.0}, "--lr_scheduler_power is given too"),
        ({"name": "polynomial", "args": ["lr_end=5.0"]}, "--learning_rate must be above it"),
        ({"name": "warmup_stable_decay", "decay": 5, "args": ["decay_type='x'"]}, "--lr_scheduler_args: "),
        ({"type": "NoSuchLR"}, "NoSuchLR"),
        ({"type": "nopackage.LR"}, "nopackage is not installed"),
        ({"type": "StepLR"}, "step_size"),
        ({"type": "StepLR", "args": ["step_size=3", "gama=1"]}, "gama"),
        ({"type": "ReduceLROnPlateau"}, "its steps need metrics"),
        ({"name": "piecewise_constant", "args": ["step_rules='1:a,0.1'"]}, "step_rules"),
        ({"name": "piecewise_constant", "args": ["step_rules='1:5,0.1'", "more=1"]}, "more"),
        ({"name": "cosine_with_min_lr", "min_lr_ratio": 1.5}, "between 0 and 1"),
        ({"name": "inverse_sqrt", "timescale": 0}, "at least 1"),
        ({"name": "polynomial", "power": -1.0}, "--lr_scheduler_power"),
    ],
)
def test_mistakes(settings: dict, words: str) -> None:
    with pytest.raises(UserError) as found:
        check_scheduler(ADAMW, ScheduleSettings(**settings))
    assert words in str(found.value)


def test_settings_without_effect_are_warned_of() -> None:
    assert check_scheduler(ADAMW, ScheduleSettings(args=[])) == []
    (found,) = check_scheduler(ADAMW, ScheduleSettings(name="cosine", decay=10, power=2.0))
    assert found == "--lr_decay_steps, --lr_scheduler_power: no effect with --lr_scheduler cosine"
    assert isinstance(found, NoEffect)
    (found,) = check_scheduler(ADAMW, ScheduleSettings(name="constant", warmup=10))
    assert found == "--lr_warmup_steps: no effect with --lr_scheduler constant; use constant_with_warmup"
    rules = ["step_rules='1:5,0.1'"]
    (found,) = check_scheduler(ADAMW, ScheduleSettings(name="piecewise_constant", args=rules, warmup=5))
    assert "--lr_warmup_steps" in found
    (found,) = check_scheduler(ADAMW, ScheduleSettings(name="cosine", type="StepLR", args=["step_size=3"]))
    assert found.startswith("--lr_scheduler: no effect")
    (found,) = check_scheduler(ADAFACTOR, ScheduleSettings(name="cosine"))
    assert found.startswith("--lr_scheduler: no effect with Adafactor")
    assert check_scheduler(ADAFACTOR, ScheduleSettings()) == []
    assert check_scheduler(ADAFACTOR, ScheduleSettings(name="adafactor:0.001")) == []
    # programs write a warm-up for every optimizer and schedule
    (found,) = check_scheduler(ADAFACTOR, ScheduleSettings(name="adafactor", warmup=10))
    assert found.startswith("--lr_warmup_steps: no effect with Adafactor") and "warmup_init=True" in found
    (found,) = check_scheduler(ADAMW, ScheduleSettings(type="StepLR", args=["step_size=3"], warmup=3))
    assert found == "--lr_warmup_steps: no effect with --lr_scheduler_type StepLR"


def test_a_schedule_free_optimizer_needs_none() -> None:
    pytest.importorskip("schedulefree")
    free = resolve_optimizer("AdamWScheduleFree", False, False, None, 0.5)
    (found,) = check_scheduler(free, ScheduleSettings(name="cosine", warmup=10))
    assert "--lr_scheduler, --lr_warmup_steps" in found and "warmup_steps=100" in found
    optimizer = free.create([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    schedule = create_scheduler(optimizer, free, ScheduleSettings(name="cosine"), total_steps=4)
    for _ in range(4):
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_polynomial_must_start_above_its_end() -> None:
    low = resolve_optimizer("AdamW", False, False, None, 1e-7)
    with pytest.raises(UserError, match="--learning_rate"):
        check_scheduler(low, ScheduleSettings(name="polynomial"))


def test_a_warm_up_longer_than_the_run_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = ADAMW.create([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    create_scheduler(optimizer, ADAMW, ScheduleSettings(name="cosine", warmup=50), total_steps=10)
    assert "--lr_warmup_steps 50" in caplog.text


def test_adafactor_brings_its_own() -> None:
    assert scheduler_name(ADAFACTOR, ScheduleSettings()) == "adafactor:0.001"
    one, two = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = ADAFACTOR.create([{"params": [one]}, {"params": [two]}])
    schedule = create_scheduler(optimizer, ADAFACTOR, ScheduleSettings(), total_steps=10)

    def rates() -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    assert rates() == [0.001, 0.001]
    schedule.step()  # the gradient scaler skipped the first step
    assert rates() == [0.001, 0.001]
    two.grad = torch.ones(3, 3)  # the first group's module is left out of this step
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    # min(0.01, 1 / sqrt(1)), times the weights' root mean square of 2
    assert rates() == pytest.approx([0.001, 0.02])


@pytest.mark.parametrize("value", [(10, 100, 10), (0.1, 100, 10), (1.0, 100, 100), (0, 100, 0)])
def test_steps_or_share(value: tuple[float, int, int]) -> None:
    given, total, steps = value
    assert steps_of(given, total) == steps


@pytest.mark.parametrize("name", [*NAMES, "OneCycleLR"])
def test_a_restored_schedule_goes_on_exactly(name: str) -> None:
    settings = ScheduleSettings(name=name, warmup=3, decay=5, min_lr_ratio=0.1)
    if name == "piecewise_constant":
        settings = ScheduleSettings(name=name, args=["step_rules='1:9,0.1:12,0.01'"])
    if name == "OneCycleLR":
        settings = ScheduleSettings(type=name, args=["max_lr=1.0", "total_steps=20"])

    def make() -> tuple:
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
