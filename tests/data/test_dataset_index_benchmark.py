"""``benchmarks/dataset_index.py`` runs, and a record stays within its memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.dataset_index import make_images, measure, scan


def test_it_measures_every_kind_of_scan() -> None:
    metrics = measure(48, 1, pillow=True)
    assert metrics.count == 48
    assert min(metrics.seconds_plain, metrics.seconds_first, metrics.seconds_second, metrics.seconds_pillow) >= 0
    assert 50 < metrics.cache_bytes_per_image < 400


def test_a_record_takes_at_most_300_bytes(tmp_path: Path) -> None:
    make_images(tmp_path, 3000)
    for cache_info in (False, True, True):
        assert 150 < scan(tmp_path, cache_info=cache_info, memory=True) <= 300
