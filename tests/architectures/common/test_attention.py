"""Every implementation of attention computes the formula, with and without a mask of keys."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from library.architectures.common.attention import BACKENDS, attend, check_backend
from library.errors import UserError

MASK = torch.tensor([[True] * 7 + [False] * 4, [True, False] * 5 + [True]])


def tensors(device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 5, 3, width), (2, 11, 3, width), (2, 11, 3, width))  # (B, L, H, d)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("backend", ["torch", "math", "efficient"])
def test_outputs_and_gradients_are_the_formulas(backend: str, masked: bool) -> None:
    given, expected = tensors(), tensors()
    mask = MASK if masked else None
    out, right = attend(*given, mask, backend=backend), formula(*expected, mask)
    assert out.shape == (2, 5, 3, 8)
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    right.square().sum().backward()
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_flex_attention_is_the_formula(masked: bool) -> None:
    mask = MASK if masked else None
    given = tensors(width=16)
    frozen = [tensor.detach() for tensor in given]
    out = attend(*frozen, mask, backend="flex")
    torch.testing.assert_close(out, formula(*frozen, mask), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match='"flex" has no backward pass on a CPU'):
        attend(*given, mask, backend="flex")


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend: str, masked: bool) -> None:
    if BACKENDS[backend] is not None:
        pytest.importorskip(BACKENDS[backend])
    given, expected = (tensors("cuda", dtype, width=64) for dtype in (torch.bfloat16, torch.float32))
    mask = MASK.cuda() if masked else None
    with torch.set_grad_enabled(backend != "sageattn"):
        out = attend(*given, mask, backend=backend)
    right = formula(*expected, mask)
    assert (out - right).abs().max() < 0.05
    if backend != "sageattn":
        out.float().square().sum().backward()
        right.square().sum().backward()
        for one, other in zip(given, expected, strict=True):
            assert (one.grad - other.grad).abs().max() < 0.1


def test_what_is_not_there_is_said() -> None:
    assert check_backend("torch") == "torch"
    with pytest.raises(UserError, match=r'attention "sagattn" is not known \(did you mean "sageattn"\?\)'):
        check_backend("sagattn")
    for backend, package in BACKENDS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            with pytest.raises(UserError, match=f'attention "{backend}" needs the package {package}.*use --sdpa'):
                check_backend(backend)
