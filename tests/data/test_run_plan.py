"""Lengths of a run, worked by hand."""

import pytest

from library.data.run_plan import Origin, Position, RunPlan


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


@pytest.mark.parametrize(("batches", "accumulation"), [(5, 1), (5, 2), (4, 2), (1, 3)])
def test_every_batch_knows_its_step(batches: int, accumulation: int) -> None:
    plan = make(batches, accumulation)
    for step in range(20):
        start = plan.position(step)
        of_step = range(start.batch_in_epoch, start.batch_in_epoch + plan.batches_of_step(start.batch_in_epoch))
        assert {plan.step_of(start.epoch, batch) for batch in of_step} == {step}


def test_the_last_step_of_an_epoch_may_be_short() -> None:
    plan = make(5, 2)
    assert [plan.batches_of_step(start) for start in (0, 2, 4)] == [2, 2, 1]


def test_data_that_begin_at_a_step() -> None:
    """Step 4 lies in the second epoch of three steps; that epoch's data begin anew there."""
    plan = RunPlan.make(
        batches_per_epoch=5,
        gradient_accumulation_steps=2,
        max_train_steps=7,
        max_train_epochs=3,
        origin=Origin(step=4, epoch=1),
    )
    assert (plan.total_steps, plan.num_epochs) == (4 + 3 + 3, 3)
    assert [plan.position(step) for step in (4, 6, 7)] == [Position(1, 0, 0), Position(1, 2, 4), Position(2, 0, 0)]
    assert [plan.step_of(1, batch) for batch in range(5)] == [4, 4, 5, 5, 6]
    assert [plan.epochs_begun(step) for step in (5, 7, 8)] == [2, 2, 3]
    assert plan.steps_until(2) == 7
