"""Processes part before the first of them is gone."""

from __future__ import annotations

from library.errors import UserError
from library.training.processes import finalizing


class Joined:
    def __init__(self) -> None:
        self.parted = 0

    def end_training(self) -> None:
        self.parted += 1


def test_at_the_end_and_where_all_stop_but_not_after_an_error_of_one() -> None:
    for error, parted in ((None, 1), (SystemExit(130), 1), (UserError("a disk is full"), 0)):
        joined = Joined()
        try:
            with finalizing(joined):  # type: ignore[arg-type]
                assert not joined.parted
                if error is not None:
                    raise error
        except (SystemExit, UserError) as raised:
            assert raised is error
        assert joined.parted == parted


def test_a_function_may_return_out_of_it() -> None:
    joined = Joined()

    def planned() -> str:
        with finalizing(joined):  # type: ignore[arg-type]
            return "plan"

    assert planned() == "plan" and joined.parted == 1
