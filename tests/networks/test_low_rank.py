"""The product of a linear layer with its adapter: values, gradients, what is kept, and who uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from library.architectures.lora_target import LORA_TARGET, LoraTarget
from networks.lora import create_network
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


# ---- copies of the weights in the dtype of the products ----


def network() -> tuple[nn.Module, Any]:
    """Three layers in bfloat16, checkpointed one by one, and float32 adapters that change them."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    model = nn.ModuleDict({"layers": layers}).to(torch.bfloat16).requires_grad_(False)
    setattr(model, LORA_TARGET, LoraTarget("lora_unet", ("Sequential",)))
    made = create_network(1.0, 4, 2.0, None, [], model)
    for adapter in made.adapters:
        nn.init.normal_(adapter.lora_up.weight, std=0.1)
    made.apply_to([], model, False, True)
    return model, made.train()


def step(model: nn.Module, *, checkpointed: bool = True) -> Tensor:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for layer in model["layers"]:
        x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    return x.float().square().mean()


class Foreach(TorchDispatchMode):
    """Counts casts of all weights together, and of single ones."""

    def __init__(self) -> None:
        super().__init__()
        self.together = self.single = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.together += func is torch.ops.aten._foreach_copy_.default
        half = (kwargs or {}).get("dtype") == torch.bfloat16
        is_weight = isinstance(args[0], Tensor) and sorted(args[0].shape) == [4, 16]  # of either half
        self.single += func is torch.ops.aten._to_copy.default and half and is_weight
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("checkpointed", "cast_again"), [(False, 0), (True, 6)])
def test_weights_are_cast_together_once_a_step(checkpointed: bool, cast_again: int) -> None:
    """Gradients are bit for bit those of single casts; no copy is left behind the backward pass.

    Copies of checkpointed layers are not there between their two passes.
    """
    (model, made), (other, plain) = network(), network()
    for adapter in plain.adapters:
        adapter.casts = None
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (made, plain)]
    for _ in range(3):
        with Foreach() as counted:
            loss = step(model, checkpointed=checkpointed)
            assert len(made.adapters[0].casts._copies) == (0 if checkpointed else 6)
            loss.backward()
        assert (counted.together, counted.single) == (1, cast_again)
        assert not made.adapters[0].casts._copies
        expected = step(other, checkpointed=checkpointed)
        expected.backward()
        assert torch.equal(loss, expected)
        for one, two in zip(made.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("between", ["backward", "nothing"])
def test_changed_weights_are_cast_again(between: str) -> None:
    """Many optimizers change ``.data``, which no counter shows; a layer that a pass leaves out keeps its copy."""
    model, made = network()
    left_out = made.adapters[0]
    left_out.enabled = False
    loss = step(model)
    if between == "backward":
        loss.backward()
        for parameter in made.parameters():
            parameter.data.mul_(2.0)
    else:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(2.0)
    left_out.enabled = True
    found = step(model)
    for adapter in made.adapters:
        adapter.casts = None
    assert torch.equal(found, step(model))


def test_without_gradients_nothing_is_kept() -> None:
    model, made = network()
    with torch.no_grad():
        step(model)
    assert not made.adapters[0].casts._copies
