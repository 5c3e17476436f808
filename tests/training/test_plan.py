"""Lengths of a run, worked by hand."""

import pytest

from library.training.plan import Position, RunPlan


def make(batches: int, accumulation: int, steps: int = 1600, epochs: int | None = None) -> RunPlan:
    return RunPlan.make(
        batches_per_epoch=batches,
        gradient_accumulation_steps=accumulation,
        max_train_steps=steps,
        max_train_epochs=epochs,
    )


def test_epochs_win_over_steps() -> None:
    assert make(5, 1, steps=7, epochs=3).total_steps == 15
    assert make(5, 2, steps=7, epochs=3).total_steps == 9  # 2 + 2 + 1 batches make 3 steps


def test_a_cut_last_epoch_still_counts() -> None:
    plan = make(5, 1, steps=7)
    assert plan.num_epochs == 2
    assert make(5, 1, steps=10).num_epochs == 2


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, Position(0, 0, 0)), (2, Position(0, 2, 4)), (3, Position(1, 0, 0)), (7, Position(2, 1, 2))],
)
def test_position_with_accumulation(step: int, expected: Position) -> None:
    assert make(5, 2).position(step) == expected


def test_the_last_step_of_an_epoch_may_be_short() -> None:
    plan = make(5, 2)
    assert [plan.batches_of_step(start) for start in (0, 2, 4)] == [2, 2, 1]
