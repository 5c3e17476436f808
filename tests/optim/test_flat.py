"""Many tensors at once: whether all are finite."""

import pytest
import torch

from library.optim.flat import all_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found(dtype: torch.dtype, value: float) -> None:
    good, bad = torch.randn(8, 4, 3, 3, dtype=dtype), torch.randn(8, 4, 3, 3, dtype=dtype)
    bad = bad.to(memory_format=torch.channels_last)
    bad[5, 2, 1, 1] = value
    assert not all_finite([good, bad])
    assert all_finite([good])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_numbers_pass(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite([torch.full((100,), largest, dtype=dtype), torch.full((100,), -largest, dtype=dtype)])


def test_what_cannot_be_infinite_is_left_out() -> None:
    assert all_finite([torch.ones(2), torch.ones(2, dtype=torch.uint8), torch.empty(0, 4)])
