"""A batch comes out of its parcel as it went in, whatever its tensors' size and dtype."""

import pickle

import pytest
import torch

from library.data.parcel import LARGE, Parcel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_every_dtype_arrive_unchanged(dtype):
    sent = torch.arange(24).view(2, 3, 4).to(dtype)
    (received,) = pickle.loads(pickle.dumps(Parcel([sent]))).unpack()
    assert received.dtype == dtype and received.shape == sent.shape
    assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))


def test_a_tensor_that_is_not_contiguous_arrives_in_its_own_order():
    sent = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(Parcel(sent).unpack(), sent)


def test_empty_and_scalar_tensors_arrive():
    empty, scalar = Parcel([torch.empty(0, 4), torch.tensor(2.5)]).unpack()
    assert empty.shape == (0, 4) and scalar.shape == () and scalar.item() == 2.5


def test_large_tensors_are_shared_not_copied():
    large = torch.zeros(LARGE, dtype=torch.uint8)
    assert Parcel([large]).unpack()[0].data_ptr() == large.data_ptr()


def test_what_arrives_may_be_written_to():
    received = Parcel(torch.zeros(3)).unpack()
    received += 1
    assert received.sum() == 3
