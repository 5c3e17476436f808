"""The files that a dry run announces are those that a run writes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from library.data.run_plan import RunPlan
from library.training.checkpoints import OutputNames, SavePolicy
from library.training.dry_run import PlannedFile, _lines, planned_files, print_plan

NAMES = OutputNames(Path("out"), "tiny", "safetensors")


def policy(**given: object) -> SavePolicy:
    nothing = dict.fromkeys(SavePolicy.__dataclass_fields__)
    return SavePolicy(**{**nothing, "save_state": False, "save_state_on_train_end": False, **given})  # type: ignore[arg-type]


def plan(*, per_epoch: int, steps: int) -> RunPlan:
    return RunPlan(batches_per_epoch=per_epoch, gradient_accumulation_steps=1, total_steps=steps)


def names(files: list[PlannedFile], *, staying: bool) -> list[str]:
    return sorted(f.path.name for f in files if not staying or f.removed_after is None)


def test_the_files_of_a_whole_run() -> None:
    """The settings of test_a_whole_run in tests/entry/, which sees these names on the disk."""
    saves = policy(every_n_epochs=1, last_n_epochs=1, every_n_steps=4, save_state=True)
    files = planned_files(plan(per_epoch=5, steps=15), saves, NAMES)
    epochs = [name for name in names(files, staying=True) if name.startswith("tiny-0")]
    assert epochs == ["tiny-000002-state", "tiny-000002.safetensors"]
    steps = [f.step for f in files if f.path.name.startswith("tiny-step") and f.path.suffix]
    assert steps == [4, 8, 12]
    first = next(f for f in files if f.path.name == "tiny-000001.safetensors")
    assert (first.step, first.removed_after) == (5, 10)
    assert {"tiny.safetensors", "tiny-state"} <= set(names(files, staying=True))
    assert files[-1].step == 15


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [
        ({}, 10, ["tiny.safetensors"]),
        ({"save_state_on_train_end": True}, 10, ["tiny-state", "tiny.safetensors"]),
        (
            {"every_n_steps": 4},
            10,
            ["tiny-step00000004.safetensors", "tiny-step00000008.safetensors", "tiny.safetensors"],
        ),
        # keeps saves of the last 5 steps before each
        ({"every_n_steps": 4, "last_n_steps": 3}, 10, ["tiny-step00000008.safetensors", "tiny.safetensors"]),
        # the last epoch, cut short or not, is the final file
        ({"every_n_epochs": 1}, 10, ["tiny-000001.safetensors", "tiny-000002.safetensors", "tiny.safetensors"]),
    ],
)
def test_what_stays(given: dict[str, object], steps: int, expected: list[str]) -> None:
    assert names(planned_files(plan(per_epoch=4, steps=steps), policy(**given), NAMES), staying=True) == expected


def test_states_may_go_before_weights() -> None:
    saves = policy(every_n_epochs=1, last_n_epochs=2, last_n_epochs_state=1, save_state=True)
    files = planned_files(plan(per_epoch=1, steps=4), saves, NAMES)
    assert names(files, staying=True) == [
        "tiny-000002.safetensors",
        "tiny-000003-state",
        "tiny-000003.safetensors",
        "tiny-state",
        "tiny.safetensors",
    ]


def test_a_resumed_run_writes_the_rest() -> None:
    files = planned_files(plan(per_epoch=4, steps=12), policy(every_n_steps=4), NAMES, after_step=4)
    assert [f.step for f in files] == [8, 12, 12]


def test_long_lists_are_cut_and_existing_files_named(tmp_path: Path) -> None:
    there = OutputNames(tmp_path, None, "safetensors")
    there.final().touch()
    files = planned_files(plan(per_epoch=10, steps=100), policy(every_n_steps=1, last_n_steps=50), there)
    lines = _lines(files, last_step=100)
    assert len(lines) == 13 and lines[6] == "... 89 more ..."
    assert lines[0].endswith("at-step00000001.safetensors after step 1, removed after step 52")
    assert lines[-1] == f"{there.final()} at the end, replaces what is there"


def test_plain_output() -> None:
    out = io.StringIO()
    print_plan([("steps", "10")], ["a.safetensors at the end"], file=out)
    assert out.getvalue().splitlines() == [
        "steps: 10",
        "would write: a.safetensors at the end",
        "dry run: all checks passed; no weights were loaded",
    ]
