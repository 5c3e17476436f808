"""Fused steps of transformer blocks: values and gradients of the plain formulas, and fewer kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library.architectures.common.fused import NORM_EPS, add_gated, modulated_norm, rotate
from library.memory.stand_in import measure

B, L, H, D = 2, 5, 3, 8


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles() -> tuple[Tensor, Tensor]:
    turned = numbers(L, 1, D // 2, seed=9)
    return turned.cos(), turned.sin()


def plain_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def plain_rotation(x: Tensor) -> Tensor:
    cos, sin = angles()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


CASES = {
    "norm": (modulated_norm, plain_norm, ((B, L, D), (B, 1, D), (B, 1, D))),
    "norm of one": (modulated_norm, plain_norm, ((1, L, D), (1, 1, D), (1, 1, D))),
    "gate": (add_gated, lambda x, gate, change: x + gate * change, ((B, L, D), (B, 1, D), (B, L, D))),
    "rotation": (lambda x: rotate(x, angles()), plain_rotation, ((B, L, H, D),)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case: str) -> None:
    fused, plain, shapes = CASES[case]
    inputs = [numbers(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    torch.testing.assert_close(fused(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(fused, inputs)
    for index in range(len(inputs)):  # each alone
        some = [x.detach().requires_grad_(number == index) for number, x in enumerate(inputs)]
        assert torch.autograd.gradcheck(fused, some)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_rounded_as_well_as_the_formula(case: str) -> None:
    fused, plain, shapes = CASES[case]
    exact = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    half = [x.to(torch.bfloat16) for x in exact]
    for found in (fused(*half), plain(*half).to(torch.bfloat16)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), plain(*(x.double() for x in half)), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("case", CASES)
def test_the_compiler_sees_the_formula(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain, shapes = CASES[case]
    inputs = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    torch.testing.assert_close(fused(*inputs), plain(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_fewer_kernels_or_less_memory(case: str) -> None:
    fused, plain, shapes = CASES[case]

    def cost(function: Callable[..., Tensor]) -> tuple[int, int]:
        """Kernels of both passes, and bytes of tokens that are kept between them."""
        inputs = [numbers(*shape, seed=seed).float().requires_grad_() for seed, shape in enumerate(shapes)]
        kept: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function(*inputs)
        step = measure(lambda: function(*inputs).sum().backward(), inputs, device_type="cpu")
        return step.kernels, sum(kept.values())

    (few, little), (many, much) = cost(fused), cost(plain)
    assert few <= many and little <= much and (few, little) != (many, much)
