"""Frozen weights in scaled fp8: accuracy, gradients, memory, and adapters on top."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.memory.fp8 import (
    FORMAT,
    ScaledFp8Conv2d,
    ScaledFp8Linear,
    dequantise,
    quantise,
    store_in_fp8,
    weight_bytes,
)
from networks.lora import create_network
from tests.networks.conftest import make_tiny_text_encoder, make_tiny_unet

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("size", [1.0, 0.02, 1e-3, 1e-5])
def test_weights_of_any_size_keep_their_first_digits(size: float) -> None:
    weight = normal(64, 256) * size
    weight[3] *= 50  # a row that one scale for the whole tensor would let all others pay for
    weight[5] = 0.0
    found = dequantise(*quantise(weight), torch.float32)
    large = weight.abs() > weight.abs().amax(dim=1, keepdim=True) / 2**14  # above the smallest normal number
    assert (((found - weight).abs() <= weight.abs() * 2**-4 * 1.001) | ~large).all()
    assert relative_error(found, weight) < 0.03
    assert not found[5].any()
    # what a cast without scales leaves of the usual rows
    unscaled, scaled = relative_error(weight.to(FORMAT)[:3], weight[:3]), relative_error(found[:3], weight[:3])
    assert unscaled > {1.0: 1.0, 0.02: 1.15, 1e-3: 15, 1e-5: 30}[size] * scaled


def stored(layer: nn.Module) -> nn.Module:
    """The layer in fp8, as a block of a model would hold it."""
    return store_in_fp8(nn.ModuleList([copy.deepcopy(layer).requires_grad_(False)]), CPU)[0]


LAYERS = [
    (nn.Linear(96, 48), (2, 7, 96), ScaledFp8Linear),
    (nn.Linear(96, 48, bias=False), (5, 96), ScaledFp8Linear),
    (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 8), ScaledFp8Conv2d),
    (nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=2, bias=False), (1, 16, 8, 8), ScaledFp8Conv2d),
]


@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradient_are_those_of_the_dequantised_weight(layer, shape, kind, autocast: bool) -> None:
    small = stored(layer)
    assert type(small) is kind and isinstance(small, type(layer))
    plain = copy.deepcopy(layer).requires_grad_(False)
    plain.weight.copy_(small.weight)
    gradients, outputs = [], []
    for module in (small, plain):
        x = normal(*shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        out.backward(normal(*out.shape, seed=1).to(out.dtype))
        outputs.append(out.detach())
        gradients.append(x.grad)
    assert outputs[0].dtype == outputs[1].dtype == (torch.bfloat16 if autocast else torch.float32)
    bound = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(outputs[0], outputs[1], rtol=bound, atol=bound)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=bound, atol=bound)
    assert relative_error(outputs[0], layer(normal(*shape)).detach()) < 0.04


@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS[::2], ids=["linear", "conv"])
def test_autograd_keeps_no_weight_at_full_size(layer, shape, kind) -> None:
    small, kept = stored(layer), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        small(normal(*shape).requires_grad_())
    weights = [t for t in kept if t.shape == layer.weight.shape]
    assert [t.dtype for t in weights] == [FORMAT]


def test_memory_is_a_byte_for_each_weight() -> None:
    model = nn.ModuleList([nn.Linear(512, 512, bias=False), nn.Conv2d(64, 64, 3, bias=False)])
    model.to(torch.bfloat16).requires_grad_(False)
    before = weight_bytes(model)
    store_in_fp8(model, CPU)
    numbers = 512 * 512 + 64 * 64 * 9
    assert before == 2 * numbers
    assert weight_bytes(model) == numbers + 4 * (512 + 64)


def predict(unet: nn.Module) -> torch.Tensor:
    return unet(normal(2, 4, 8, 8), torch.tensor([10, 700]), normal(2, 5, 16, seed=3)).sample


def test_a_model_keeps_first_and_last_layers_and_its_prediction() -> None:
    plain, scaled, cast = make_tiny_unet(), make_tiny_unet(), make_tiny_unet()
    for unet in (plain, scaled, cast):
        for name, module in unet.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and "block" in name:
                module.weight.data.mul_(0.05)  # wide layers have small weights, these few channels large ones
    store_in_fp8(scaled, CPU)
    for outside in (scaled.conv_in, scaled.conv_out, scaled.time_embedding.linear_1):
        assert type(outside) in (nn.Conv2d, nn.Linear)
    kinds = [type(m) for m in scaled.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sum(kind in (ScaledFp8Linear, ScaledFp8Conv2d) for kind in kinds) > 0.9 * len(kinds)
    for one, other in zip(scaled.modules(), cast.modules(), strict=True):
        if isinstance(one, (ScaledFp8Linear, ScaledFp8Conv2d)):
            other.weight.data = other.weight.data.to(FORMAT).float()
    with torch.no_grad():
        exact = predict(plain)
        assert relative_error(predict(scaled), exact) < 0.02
        assert relative_error(predict(scaled), exact) < 0.5 * relative_error(predict(cast), exact)


@pytest.mark.parametrize(
    "kind", [{}, {"dora": "True"}, {"dora": "True", "dora_on_output": "True"}], ids=["lora", "dora", "dora_out"]
)
def test_adapters_work_on_top_and_come_off(kind: dict[str, str]) -> None:
    small, plain = store_in_fp8(make_tiny_unet(), CPU), make_tiny_unet()
    for one, other in zip(small.modules(), plain.modules(), strict=True):
        if isinstance(one, (ScaledFp8Linear, ScaledFp8Conv2d)):
            other.weight.data.copy_(one.weight)
    found = []
    for unet in (small, plain):
        text = make_tiny_text_encoder()
        torch.manual_seed(4)
        network = create_network(1.0, 2, 1.0, None, [text], unet, conv_dim="2", conv_alpha="1", **kind)
        network.apply_to([text], unet, False, True)
        torch.manual_seed(5)
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                nn.init.normal_(parameter, std=0.1)
        network.prepare_grad_etc([text], unet)
        out = predict(unet)
        out.square().mean().backward()
        found.append((out.detach(), {name: p.grad for name, p in network.named_parameters()}, network))
    (out, gradients, network), (expected, expected_gradients, _) = found
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)

    with pytest.raises(UserError, match="fp8, into which nothing can be merged"):
        network.merge()
    with pytest.raises(UserError, match="fp8"):
        network.merge_to([make_tiny_text_encoder()], small, None)
    network.remove()
    bare = store_in_fp8(make_tiny_unet(), CPU)
    with torch.no_grad():
        assert torch.equal(predict(small), predict(bare))


@pytest.mark.gpu
def test_on_a_gpu_only_fp8_weights_stay_and_the_peak_is_one_layer() -> None:
    model = nn.ModuleList([nn.Linear(4096, 4096, bias=False) for _ in range(8)]).to(torch.bfloat16)
    model.requires_grad_(False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    store_in_fp8(model, torch.device("cuda"))
    numbers = 8 * 4096 * 4096
    assert torch.cuda.memory_allocated() - start < 1.05 * numbers
    # one layer in bf16, and in float32 while it is divided
    assert torch.cuda.max_memory_allocated() - start < numbers + 16 * 4096 * 4096
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    out = x
    for layer in model:
        out = layer(out)
    assert torch.cuda.memory_allocated() - before < 2 * 4096 * 4096  # not one weight is kept for the backward pass
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_numbers_of_an_fp8_file_are_kept() -> None:
    stored = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    numbers, scale = quantise(stored.to(torch.bfloat16))
    assert torch.equal(numbers.view(torch.uint8), stored.view(torch.uint8))
    assert scale.shape == (8, 1) and (scale == 1).all()
