"""``benchmarks/check_dataset.py`` runs, and the copies that it makes are found."""

from __future__ import annotations

from benchmarks.check_dataset import COPIES, measure


def test_it_measures_the_tool() -> None:
    metrics = measure(COPIES + 1, 100, size=(96, 72))
    assert (metrics.count, metrics.look_alikes_found) == (COPIES + 1, 1)
    assert metrics.seconds > 0 and metrics.search_seconds >= 0
