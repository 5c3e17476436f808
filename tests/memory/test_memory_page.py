"""docs/memory.md agrees with the recorded traces and with the plan's choices."""

from __future__ import annotations

from tests.memory.table import PAGE, written


def test_the_page_has_the_values_of_the_records() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run: python tests/memory/table.py"
