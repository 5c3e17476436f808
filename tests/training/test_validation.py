"""Steps at which validations are due, the best result, and settings that have no effect."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from library.config.arguments import DatasetOptions, ValidationOptions
from library.data.dataset_config import load_dataset_config
from library.data.dataset_spec import DatasetConfig
from library.data.run_plan import RunPlan
from library.diffusion.timesteps import spread_timesteps
from library.errors import UserError
from library.training.resume import STATE_FILE, read_state
from library.training.validation import BestSoFar, ValidationPolicy, check_validation
from tests.data.samples import draw


@pytest.mark.parametrize(
    ("every_n_steps", "every_n_epochs", "steps", "epochs"),
    [
        (None, None, [], [4, 8]),  # after each epoch, and at the end
        (None, 2, [], [8]),
        (None, 3, [], []),
        (3, None, [3, 6, 9], [4, 8]),
        (4, 2, [4, 8], [8]),
    ],
)
def test_when_validations_are_due(
    every_n_steps: int | None, every_n_epochs: int | None, steps: list[int], epochs: list[int]
) -> None:
    policy = ValidationPolicy(RunPlan(4, 1, total_steps=10), every_n_steps, every_n_epochs)
    due = {axis: [step for step in range(1, 11) if axis in policy.axes(step)] for axis in ("step", "epoch")}
    # the last step, 10, is always one, on the curve of steps where there is one
    assert due == {"step": steps + [10] * (every_n_steps is not None), "epoch": epochs + [10] * (every_n_steps is None)}


def test_an_epoch_of_accumulated_steps_is_found() -> None:
    policy = ValidationPolicy(RunPlan(5, 2, total_steps=9), None, None)  # three steps an epoch
    assert [step for step in range(1, 10) if policy.axes(step)] == [3, 6, 9]


def test_the_best_and_misses_since() -> None:
    best = BestSoFar()
    assert json.loads(json.dumps(best.state())) == {"step": 0, "misses": 0}
    assert [best.add(loss, step) for step, loss in enumerate([0.5, 0.6, 0.5, 0.4, math.nan], start=1)] == [
        *(True, False, False, True, False)
    ]
    assert json.loads(json.dumps(best.state())) == {"loss": 0.4, "step": 4, "misses": 1}


def test_a_first_loss_that_is_not_finite_is_no_best() -> None:
    best = BestSoFar()
    assert not best.add(math.nan, 1) and not best.add(math.inf, 2)
    assert (best.step, best.misses) == (0, 2)


def test_a_state_from_before_has_no_best(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text('{"current_epoch": 1, "current_step": 4, "losses": []}')
    assert read_state(tmp_path).validation == {}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1000, (125, 375, 625, 875)), (200, 400, (225, 275, 325, 375)), (10, 12, (10, 11)), (5, 6, (5,))],
)
def test_timesteps_are_spread_over_those_trained(low: int, high: int, expected: tuple[int, ...]) -> None:
    assert spread_timesteps(low, high, 4) == expected


# ---- settings ----


@pytest.fixture
def config(tmp_path: Path):
    folder = draw(tmp_path / "images", {"a.png": (8, 8)})

    def make(general: str = "", subset: str = "", **flags: object) -> tuple[DatasetConfig, ValidationOptions]:
        path = tmp_path / "data.toml"
        path.write_text(
            f"[general]\n{general}\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
            f"image_dir = '{folder}'\n{subset}"
        )
        options = ValidationOptions(**flags)
        return load_dataset_config(path, DatasetOptions(), options), options

    return make


def test_the_ends_that_need_validation(config) -> None:
    with pytest.raises(UserError) as found:
        check_validation(*config(early_stopping_patience=3, save_best=True))
    assert [line.partition(":")[0] for line in str(found.value).splitlines()] == [
        "--early_stopping_patience", "--save_best",
    ]  # fmt: skip
    check_validation(*config("validation_split = 0.1", early_stopping_patience=3, save_best=True))
