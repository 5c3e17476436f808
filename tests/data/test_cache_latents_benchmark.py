"""``benchmarks/cache_latents.py`` runs, and a VAE that is no faster than the readers is kept busy."""

from __future__ import annotations

from benchmarks.cache_latents import Case, measure


def test_it_measures() -> None:
    metrics = measure(Case("none", 6, 256, 1, "cpu", "no", milliseconds=300))
    assert 0.5 < metrics.busy_share <= 1
    assert 0 < metrics.images_per_second < 4
    assert metrics.seconds_total > 6 * 0.3
