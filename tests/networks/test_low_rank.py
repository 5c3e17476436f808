"""The product of a linear layer with its adapter: values, gradients, what is kept, and who uses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.low_rank import AddLowRank, LinearWithLowRank

IN, OUT, R, SCALE = 6, 5, 2, 0.75


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def parts() -> dict[str, Tensor]:
    shapes = {"x": (2, 3, IN), "down": (R, IN), "up": (OUT, R), "weight": (OUT, IN), "bias": (OUT,)}
    return {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def formula(x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + SCALE * F.linear(F.linear(x, down), up)


TRAINED = [("x", "down", "up"), ("down", "up"), ("x", "up"), ("up",), ("x",)]


@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
@pytest.mark.parametrize("whole", [True, False])
def test_values_and_gradients(parts: dict[str, Tensor], trained: tuple[str, ...], whole: bool) -> None:
    for name in trained:
        parts[name].requires_grad_()
    x, down, up, weight, bias = parts.values()

    def product(*_: Tensor) -> Tensor:
        if whole:
            return LinearWithLowRank.apply(weight, bias, x, down, up, SCALE)
        return AddLowRank.apply(F.linear(x, weight, bias), x, down, up, SCALE)

    torch.testing.assert_close(product(), formula(**parts))
    assert torch.autograd.gradcheck(product, [parts[name] for name in trained])


@pytest.mark.parametrize("whole", [True, False])
def test_a_frozen_down_half_keeps_no_input(parts: dict[str, Tensor], whole: bool) -> None:
    x, down, up, weight, bias = parts.values()
    up.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if whole:
            LinearWithLowRank.apply(weight, bias, x, down, up, SCALE)
        else:
            AddLowRank.apply(F.linear(x, weight, bias), x, down, up, SCALE)
    assert not [t for t in kept if t.shape == x.shape]


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_of_a_half_precision_base(autocast: bool) -> None:
    """Float32 adapters on a bfloat16 layer: the result has its dtype, gradients those of the adapter."""
    from networks.adapter_module import Dropouts
    from networks.lora_module import LoraModule
    from networks.targets import FoundModule, RankAlpha

    layer = nn.Linear(32, 16).to(torch.bfloat16).requires_grad_(False)
    adapter = LoraModule(FoundModule("lora_x", "x", layer), RankAlpha(4, 2.0), dropouts=Dropouts())
    nn.init.normal_(adapter.lora_up.weight, std=0.1)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()
    plain = layer(x) + 0.5 * F.linear(F.linear(x.float(), adapter.lora_down.weight), adapter.lora_up.weight)
    adapter.apply_to_original()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain.float(), rtol=0.02, atol=0.02)
    out.float().square().sum().backward()
    assert adapter.lora_down.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
