"""NaN and infinity among weights."""

from __future__ import annotations

import pytest
import torch

from library.files.finite import is_finite, not_finite, some_of


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_among_many(dtype: torch.dtype, value: float) -> None:
    good = torch.randn(333, 77).to(dtype)
    bad = torch.randn(333, 77)
    bad[200, 5] = value
    bad = bad.to(dtype)
    expected = ["bad"] if not bad.float().isfinite().all() else []  # e4m3fn has no infinity
    assert not_finite([("good", good), ("bad", bad)]) == expected


def test_infinities_that_cancel() -> None:
    assert not_finite([("x", torch.tensor([float("inf"), float("-inf")]))]) == ["x"]


def test_sums_that_overflow_are_finite() -> None:
    large = torch.full((4096,), 60000.0, dtype=torch.float16)
    assert not large.sum().isfinite() and is_finite(large)
    assert not_finite([("large", large), ("half", torch.full((9,), 3e38))]) == []


def test_what_has_no_numbers_to_look_at() -> None:
    tensors = {
        "ids": torch.arange(3),
        "flags": torch.ones(2, dtype=torch.bool),
        "empty": torch.empty(0),
        "meta": torch.empty(3, device="meta"),
    }
    assert not_finite(tensors.items()) == []


def test_words() -> None:
    assert some_of(["a"]) == "the tensor a"
    assert some_of(["a", "b"]) == "2 tensors, the first is a,"
