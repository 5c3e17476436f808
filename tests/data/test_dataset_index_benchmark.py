"""``benchmarks/dataset_index.py`` runs, and a record stays within its memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.dataset_index import make_pictures, measure, scan


def test_it_measures_every_kind_of_scan() -> None:
    figures = measure(48, 1, pillow=True)
    assert figures.count == 48
    assert min(figures.seconds_plain, figures.seconds_first, figures.seconds_second, figures.seconds_pillow) >= 0
    assert 50 < figures.cache_bytes_per_picture < 400


def test_a_record_takes_at_most_300_bytes(tmp_path: Path) -> None:
    make_pictures(tmp_path, 3000)
    for cache_info in (False, True, True):
        assert 150 < scan(tmp_path, cache_info=cache_info, memory=True) <= 300
